"""Spreads the tokens of a pack over the ranks that share it.

Context-parallel ranks (C of them): every sequence is padded to a multiple of 2C tokens and cut into
2C chunks; rank r holds chunks r and 2C - 1 - r. Under a causal mask chunk number i looks at i + 1
chunks, so each rank has the same work. This is Transformer Engine's convention
(``thd_get_partitioned_indices``). Tensor-parallel ranks then hold contiguous slices of those tokens
(sequence parallelism).
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Sequence

import torch
from torch.distributed import ProcessGroup

from megatron_rl.parallel.collectives import gather_first_dim


def sequence_multiple(context_size: int) -> int:
    """Every sequence in a pack is padded to a multiple of this many tokens."""
    return 1 if context_size == 1 else 2 * context_size


def padded_spans(lengths: Sequence[int], num_tokens: int, multiple: int) -> list[int]:
    """Lengths of the parts of a row that are cut separately: each sequence with its padding, then
    the row's padding in parts of ``multiple`` tokens.

    Raises:
        ValueError: the sequences do not fit, or the remaining padding is no multiple of
            ``multiple``.
    """
    spans = [-(-length // multiple) * multiple for length in lengths]
    left = num_tokens - sum(spans)
    if left < 0 or left % multiple:
        raise ValueError(
            f"sequences of {sum(spans)} tokens, padded to multiples of {multiple}, in a row of "
            f"{num_tokens}"
        )
    return spans + [multiple] * (left // multiple)


def zigzag_rows(spans: Sequence[int], rank: int, size: int) -> torch.Tensor:
    """The rows of a pack that context rank ``rank`` of ``size`` holds, in its order.

    Args:
        spans: lengths of the parts of the row, multiples of 2 size.

    Returns:
        int64 [T / size]: part by part, chunk ``rank`` and then chunk ``2 size - 1 - rank`` of it.
    """
    if any(span % (2 * size) for span in spans):
        raise ValueError(f"parts of {list(spans)} tokens cannot be cut into {2 * size} chunks")
    chunks = torch.tensor(spans, dtype=torch.int64) // (2 * size)
    starts = torch.tensor([0, *itertools.accumulate(spans)], dtype=torch.int64)[:-1]
    chunk, start = chunks.repeat_interleave(2 * chunks), starts.repeat_interleave(2 * chunks)
    column = torch.arange(len(chunk)) - start // size  # index among the rank's tokens of the part
    second = column >= chunk
    # The second chunk's tokens have columns from ``chunk`` on, hence one chunk less.
    return start + column + torch.where(second, 2 * size - 2 - rank, rank) * chunk


@dataclass(frozen=True)
class SequenceShards:
    """A row of T tokens, spread over the context-parallel ranks; on one rank every method is the
    identity.
    """

    group: ProcessGroup
    rows: torch.Tensor  #: int64 [T / size], the rows this rank holds
    places: torch.Tensor  #: int64 [T], index of each row after the ranks' rows are concatenated

    def local(self, whole: torch.Tensor) -> torch.Tensor:
        """This rank's rows of a tensor [T, ...]."""
        return whole if self.group.size() == 1 else whole.index_select(0, self.rows)

    def whole(self, local: torch.Tensor) -> torch.Tensor:
        """[T / size, ...] of every rank -> [T, ...], differentiable. A collective.

        All ranks compute the same function of the result (the loss of whole sequences), so the
        backward pass takes the rank's own rows of the gradient, without a sum: each token's
        gradient counts once over all ranks.
        """
        if self.group.size() == 1:
            return local
        return gather_first_dim(local, self.group).index_select(0, self.places)


def sequence_shards(
    spans: Sequence[int], group: ProcessGroup, device: torch.device
) -> SequenceShards:
    """The shards of a row with these parts on the context-parallel group."""
    if group.size() == 1:
        rows = torch.arange(sum(spans), device=device)
        return SequenceShards(group, rows, rows)
    every = torch.stack([zigzag_rows(spans, rank, group.size()) for rank in range(group.size())])
    places = every.flatten().argsort()
    return SequenceShards(group, every[group.rank()].to(device), places.to(device))


def tensor_slice(values: torch.Tensor, group: ProcessGroup) -> torch.Tensor:
    """The rows of [T, ...] that this tensor-parallel rank holds under sequence parallelism."""
    return values.chunk(group.size())[group.rank()]
