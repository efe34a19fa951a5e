"""Says what limits a run: the share of each stage in a step, and how near it comes to the speed at
which the machine multiplies matrices.
"""

from __future__ import annotations

from typing import Mapping

import torch

from megatron_rl.config.work import step_flop
from megatron_rl.device.peak import matrix_peak
from megatron_rl.models.build import DTYPES
from megatron_rl.parallel.collectives import all_reduce
from megatron_rl.run.session import Session

#: Steps after which the line is shown for the first time.
FIRST_AFTER = 3
#: A stage with a smaller share of the step is not named.
LEAST_SHARE = 0.02


class Pace:
    """Adds up the steps of this process, without its first: that one warms up."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._steps: list[Mapping[str, float]] = []

    def add(self, metrics: Mapping[str, float], *, last: bool) -> None:
        """Take in a finished step; show the line after a few, and after the last. A collective."""
        self._steps.append(metrics)
        if len(self._steps) != FIRST_AFTER and not last:
            return
        session = self._session
        own = matrix_peak(session.device, DTYPES[session.config.model.dtype])
        tensor = torch.tensor([own], dtype=torch.double, device=session.device.torch_device)
        peak = float(all_reduce(tensor, session.groups.world))
        steps = self._steps[1:] or self._steps
        seconds, tokens = _means(steps, "time/"), _means(steps, "tokens/step")
        if "time/step_s" in seconds and "tokens/step" in tokens:
            supervised = "time/rollout_s" not in seconds
            flop = step_flop(session.config, tokens["tokens/step"], supervised=supervised)
            session.console.note(pace_line(seconds, flop, peak))


def _means(steps: list[Mapping[str, float]], beginning: str) -> dict[str, float]:
    names = {name for step in steps for name in step if name.startswith(beginning)}
    return {name: sum(step.get(name, 0.0) for step in steps) / len(steps) for name in names}


def pace_line(seconds: Mapping[str, float], flop: Mapping[str, float], peak: float) -> str:
    """The stages of a step, the longest first.

    Args:
        seconds: metrics ``time/<stage>_s`` and ``time/step_s``.
        flop: FLOP of the stages that compute here.
        peak: FLOP/s of matrix products of all ranks.
    """
    whole = seconds["time/step_s"]
    stages = {
        name.removeprefix("time/").removesuffix("_s"): value
        for name, value in seconds.items()
        if name not in ("time/step_s", "time/eval_s", "time/checkpoint_s")
    }
    parts = []
    for stage, value in sorted(stages.items(), key=lambda item: -item[1]):
        if value < LEAST_SHARE * whole:
            continue
        text = f"{stage} {value / whole:.0%} ({value:.3g} s"
        if stage in flop:
            text += f", {flop[stage] / value / peak:.0%} of peak"
        parts.append(text + ")")
    return f"a step of {whole:.3g} s: {', '.join(parts)}; peak {_rate(peak)} in matrix products"


def _rate(flop_per_s: float) -> str:
    if flop_per_s >= 1e12:
        return f"{flop_per_s / 1e12:.3g} TFLOP/s"
    return f"{flop_per_s / 1e9:.3g} GFLOP/s"
