"""Weights laid out for products of few rows on a CPU."""

from __future__ import annotations

import torch

from megatron_rl.rollout.builtin.plain.weights import LINEAR, ChunkWeights, mapped

#: The fields that are the second matrix of a product.
_FACTORS = LINEAR | {"router", "head"}
#: Elements of a matrix from which it pays: to turn a smaller one takes about a microsecond.
SMALLEST = 1 << 14


def transposed(weights: ChunkWeights, most_bytes: float) -> ChunkWeights:
    """The chunk with weights [..., outputs, inputs] whose outputs lie side by side in memory.

    A product of few rows with such a weight is faster, since the library need not turn the weight
    for each of them. Of up to three rows it rounds otherwise.

    Args:
        weights: large matrices in fp32 are copied, others are views as before.
        most_bytes: of the copies; where they would be larger, the chunk itself is returned.
    """
    size = 0

    def turned(name: str, weight: torch.Tensor) -> torch.Tensor:
        if name not in _FACTORS or weight.dtype != torch.float32:
            return weight
        if weight.shape[-2] * weight.shape[-1] < SMALLEST:
            return weight
        nonlocal size
        size += weight.nbytes
        return weight.mT.contiguous().mT if size <= most_bytes else weight

    copy = mapped(weights, turned)
    return copy if size <= most_bytes else weights
