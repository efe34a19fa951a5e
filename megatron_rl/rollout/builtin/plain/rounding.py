"""Rounded copies of weights, as a sampler of lower precision has: ``rollout.round_weights``."""

from __future__ import annotations

import dataclasses
from typing import Literal

import torch

from megatron_rl.rollout.builtin.plain.weights import LINEAR, ChunkWeights, mapped

Rounding = Literal["none", "bf16", "fp8"]

#: Largest finite number of float8_e4m3fn.
FP8_MAX = 448.0
#: The routers' bias is fp32 in every precision.
_KEPT = frozenset({"bias"})


def rounded(weights: ChunkWeights, how: Rounding) -> ChunkWeights:
    """The chunk with rounded copies of its weights, of the same types; ``none``: itself."""
    if how == "none":
        return weights

    def change(name: str, weight: torch.Tensor) -> torch.Tensor:
        if name in _KEPT:
            return weight
        # vLLM's fp8 leaves routers, embedding, output layer, norms and biases in bf16.
        return to_fp8(weight) if how == "fp8" and name in LINEAR else to_bf16(weight)

    copy = mapped(weights, change)
    if weights.head is weights.words:
        copy = dataclasses.replace(copy, head=copy.words)
    return copy


def to_bf16(weight: torch.Tensor) -> torch.Tensor:
    """The nearest bf16 values, in the type of ``weight``."""
    return weight.to(torch.bfloat16).to(weight.dtype)


def to_fp8(weight: torch.Tensor) -> torch.Tensor:
    """The nearest e4m3 values times a scale for each output: [..., outputs, inputs] of any float
    type, in that type. The scale takes the output's largest weight to 448.
    """
    exact = weight.float()
    scale = exact.abs().amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny) / FP8_MAX
    # 448 times a rounded scale may lie just above the largest weight.
    eighths = (exact / scale).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
    return (eighths.float() * scale).to(weight.dtype)
