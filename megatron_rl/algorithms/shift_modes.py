"""Where gamma~ enters, other than on the ratio: on the clip range, or as a weight in a mean.

``ratios.log_shift`` is the counterpart for the modes ratio and negative_only. Each function gives
None where its mode is not asked for, so that the loss takes the same path as without router shift;
gamma~ = 1 gives the same bits as None.
"""

from __future__ import annotations

import torch

from megatron_rl.algorithms.interface import LossInputs
from megatron_rl.algorithms.ratios import positive_shift

#: The least weight in a weighted mean: keeps it defined where every gamma~ of a sequence is 0.
LEAST_WEIGHT = 1e-6

Bound = float | torch.Tensor


def range_scale(inputs: LossInputs) -> torch.Tensor | None:
    """gamma~_t as factor of the clip range, [T], detached: eps_t = eps gamma~_t (mode range)."""
    if inputs.router_shift is None or inputs.shift_mode != "range":
        return None
    return positive_shift(inputs)


def mean_weights(inputs: LossInputs) -> torch.Tensor | None:
    """g_t = max(gamma~_t, 1e-6) of exp(sum g_t log w_t / sum g_t), [T], detached (token_weight)."""
    if inputs.router_shift is None or inputs.shift_mode != "token_weight":
        return None
    return positive_shift(inputs).clamp(min=LEAST_WEIGHT)


def clip_bounds(
    centre: float, low: float, high: float, scale: torch.Tensor | None
) -> tuple[float, float] | tuple[torch.Tensor, torch.Tensor]:
    """(centre - low * scale, centre + high * scale), of the shape of ``scale``; floats without one.

    Worked out in float64 and rounded once, so that a scale of 1 gives the bounds of None.
    """
    if scale is None:
        return centre - low, centre + high
    wide = scale.clamp(min=torch.finfo(scale.dtype).tiny).double()  # an infinite bound stays one
    return (centre - low * wide).to(scale.dtype), (centre + high * wide).to(scale.dtype)
