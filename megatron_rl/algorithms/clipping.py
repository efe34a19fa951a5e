"""The pessimistic clip of PPO, for ratios and for log-ratios."""

from __future__ import annotations

import torch

from megatron_rl.algorithms.shift_modes import Bound


def pessimistic_clip(
    values: torch.Tensor, advantages: torch.Tensor, low: Bound, high: Bound
) -> torch.Tensor:
    """s * min(s * v, s * clip(v, low, high)) with s = sign(A), any shape.

    Bounds: numbers, or tensors of the shape of the values.
    That is min(v, high) where A >= 0 and max(v, low) where A < 0, so A * pessimistic_clip(r, A,
    ...) equals PPO's min(r * A, clip(r) * A). Values beyond the bound get no gradient, values on it
    do.
    """
    return torch.where(advantages >= 0, values.clamp(max=high), values.clamp(min=low))


def is_clipped(
    values: torch.Tensor, advantages: torch.Tensor, low: Bound, high: Bound
) -> torch.Tensor:
    """True where the clip cuts the gradient: v > high with A > 0, or v < low with A < 0."""
    return ((advantages > 0) & (values > high)) | ((advantages < 0) & (values < low))
