"""The policy losses by name. To add one: a file beside these, and one line in each dict."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from megatron_rl.algorithms.interface import LossInputs, LossOutputs
from megatron_rl.algorithms.losses.cispo import CispoSettings, cispo
from megatron_rl.algorithms.losses.dapo import DapoSettings, dapo
from megatron_rl.algorithms.losses.dr_grpo import DrGrpoSettings, dr_grpo
from megatron_rl.algorithms.losses.gmpo import GmpoSettings, gmpo
from megatron_rl.algorithms.losses.grpo import GrpoSettings, grpo
from megatron_rl.algorithms.losses.gspo import GspoSettings, gspo
from megatron_rl.algorithms.losses.rspo import RspoSettings, rspo
from megatron_rl.algorithms.losses.rspo_v1 import RspoV1Settings, rspo_v1
from megatron_rl.algorithms.losses.sapo import SapoSettings, sapo
from megatron_rl.algorithms.settings import Settings, override_settings, unknown_name

LOSSES: dict[str, Callable[[LossInputs, Any], LossOutputs]] = {
    "grpo": grpo,
    "dr_grpo": dr_grpo,
    "dapo": dapo,
    "gspo": gspo,
    "gmpo": gmpo,
    "cispo": cispo,
    "sapo": sapo,
    "rspo": rspo,
    "rspo_v1": rspo_v1,
}

SETTINGS: dict[str, type[Settings]] = {
    "grpo": GrpoSettings,
    "dr_grpo": DrGrpoSettings,
    "dapo": DapoSettings,
    "gspo": GspoSettings,
    "gmpo": GmpoSettings,
    "cispo": CispoSettings,
    "sapo": SapoSettings,
    "rspo": RspoSettings,
    "rspo_v1": RspoV1Settings,
}


def default_settings(name: str) -> Settings:
    """The settings of a loss, with its paper's values. Raises ValueError for an unknown name."""
    return make_settings(name, {})


def make_settings(name: str, overrides: Mapping[str, Any]) -> Settings:
    """``default_settings(name)`` with some fields replaced.

    Raises ValueError for an unknown loss or key, naming the nearest one, and for a value of the
    wrong type or range.
    """
    if name not in SETTINGS:
        raise ValueError(unknown_name("loss", name, SETTINGS))
    return override_settings(name, SETTINGS[name], overrides)
