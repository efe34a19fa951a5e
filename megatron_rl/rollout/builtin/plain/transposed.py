"""Weights laid out for products of few rows on a CPU."""

from __future__ import annotations

import torch

from megatron_rl.rollout.builtin.plain.weights import LINEAR, ChunkWeights, mapped

#: The fields that are the second matrix of a product. Not routers: ranks that share the model have
#: to choose the same experts.
_FACTORS = LINEAR | {"head"}
#: Bytes of a chunk's copies, at most. What a run samples must not depend on what memory is free.
MOST_BYTES = 256 << 20
#: Elements of a matrix from which it pays: to turn a smaller one takes about a microsecond.
SMALLEST = 1 << 14


def transposed(weights: ChunkWeights) -> ChunkWeights:
    """The chunk with weights [..., outputs, inputs] whose outputs lie side by side in memory.

    A product of few rows with such a weight is faster, since the library need not turn the weight
    for each of them. Of up to three rows it rounds otherwise.

    Args:
        weights: large matrices in fp32 are copied, others are views as before; none is where the
            copies would take more than `MOST_BYTES`.
    """
    size = 0

    def turned(name: str, weight: torch.Tensor) -> torch.Tensor:
        if name not in _FACTORS or weight.dtype != torch.float32:
            return weight
        if weight.shape[-2] * weight.shape[-1] < SMALLEST:
            return weight
        nonlocal size
        size += weight.nbytes
        return weight.mT.contiguous().mT if size <= MOST_BYTES else weight

    copy = mapped(weights, turned)
    return copy if size <= MOST_BYTES else weights
