"""A vocabulary that tensor parallelism does not divide: rows of padding that no token can be."""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed import ProcessGroup

#: Logit of a row of padding. Finite, because 0 * inf would spoil entropies; far below any logit at
#: any temperature.
NEVER = -1e9


def padded_vocabulary(vocab_size: int, tensor_parallel: int) -> int:
    """The next multiple of the tensor-parallel size."""
    return -(-vocab_size // tensor_parallel) * tensor_parallel


def mask_padding(output_layer: torch.nn.Module, vocab_size: int, group: ProcessGroup) -> None:
    """Make the output layer give `NEVER` for every row beyond the vocabulary.

    Args:
        output_layer: gives logits [..., V_padded / tp] and a bias. vocab_size: V. group: the
            tensor-parallel group; its last ranks hold the padding.
    """

    def mask(
        module: torch.nn.Module, arguments: Any, output: tuple[torch.Tensor, Any]
    ) -> tuple[torch.Tensor, Any]:
        logits, bias = output
        shard = logits.shape[-1]
        real = min(max(vocab_size - group.rank() * shard, 0), shard)
        if real < shard:
            columns = torch.arange(shard, device=logits.device)
            logits = logits.masked_fill(columns >= real, NEVER)
        return logits, bias

    output_layer.register_forward_hook(mask)
