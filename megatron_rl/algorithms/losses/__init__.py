"""The policy losses: one file each, a row each in ``catalogue/losses.py``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from megatron_rl.algorithms.interface import LossInputs, LossOutputs
from megatron_rl.catalogue import kinds
from megatron_rl.catalogue.find import find
from megatron_rl.catalogue.read import read_settings
from megatron_rl.catalogue.settings import Settings

#: By name, to be called with inputs and settings.
LOSSES: Mapping[str, Callable[[LossInputs, Any], LossOutputs]] = MappingProxyType(
    {row.name: row.load() for row in kinds.LOSSES.rows}
)


def default_settings(name: str) -> Settings:
    """The settings of a loss, with its paper's values. Raises UserError for an unknown name."""
    return make_settings(name, {})


def make_settings(name: str, overrides: Mapping[str, Any]) -> Settings:
    """``default_settings(name)`` with some fields replaced.

    Raises UserError for an unknown loss or key, naming the nearest one, and for a value of the
    wrong type or range.
    """
    row = find(kinds.LOSSES, name)
    settings = read_settings("settings", f"the loss {name}", row.settings, overrides)
    assert settings is not None, "every loss of the catalogue has settings"
    return settings
