"""Sums and means over tokens and sequences: the only place of this room that divides by a count.

Sequences are told apart by ``sequence_ids``; sums over them are one ``index_add`` each, without a
device-to-host sync. On CUDA its summation order is not fixed (last-bit differences) unless
deterministic algorithms are switched on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

#: The count of nothing: 1 + EMPTY == 1 in float64, and x / EMPTY is finite for |x| < 1e18.
EMPTY = 1e-20

SumAndCount = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Segments:
    """Which tokens are trained on and which sequence each belongs to."""

    mask: torch.Tensor  #: bool [T]
    ids: torch.Tensor  #: int64 [T], 0..N-1
    lengths: torch.Tensor  #: float [N], trained tokens of each slot; 0 for slots without one


def make_segments(
    mask: torch.Tensor,
    sequence_ids: torch.Tensor,
    num_sequences: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> Segments:
    """Count the trained tokens of each sequence.

    N = num_sequences + 1, or T + 1 where that is None; the extra slot takes the padding's id.
    Counts are exact up to 2**24 in float32.
    """
    mask, ids = mask.bool(), sequence_ids.long()
    size = (mask.numel() if num_sequences is None else num_sequences) + 1
    lengths = torch.zeros(size, dtype=dtype, device=mask.device).index_add(0, ids, mask.to(dtype))
    return Segments(mask, ids, lengths)


def sequence_sum(values: torch.Tensor, segments: Segments) -> torch.Tensor:
    """[T] -> [N]: sum over the trained tokens of each sequence; others are ignored, even NaN."""
    kept = torch.where(segments.mask, values, 0.0)
    return torch.zeros_like(segments.lengths, dtype=kept.dtype).index_add(0, segments.ids, kept)


def sequence_mean(
    values: torch.Tensor, segments: Segments, weights: torch.Tensor | None = None
) -> torch.Tensor:
    """[T] -> [N]: mean over the trained tokens of each sequence; 0 for a sequence without one.

    With weights [T] > 0: sum_t weight_t value_t / sum_t weight_t. Weights of 1 change no bit.
    """
    if weights is None:
        return sequence_sum(values, segments) / segments.lengths.clamp(min=1)
    kept = torch.where(segments.mask, weights, 0.0)
    total = sequence_sum(kept, segments)
    return sequence_sum(kept * values, segments) / torch.where(total > 0, total, 1.0)


def count_of(what: Literal["tokens", "sequences"], segments: Segments) -> torch.Tensor:
    """How many trained tokens there are, or sequences with at least one; 0-d, `EMPTY` for none."""
    if what == "tokens":
        return segments.lengths.sum().clamp(min=EMPTY)
    return (segments.lengths > 0).sum().to(segments.lengths.dtype).clamp(min=EMPTY)


def over_tokens(values: torch.Tensor, segments: Segments) -> SumAndCount:
    """[T] -> sum over all trained tokens, and how many there are (token-mean)."""
    total = torch.where(segments.mask, values, 0.0).sum()
    return total, count_of("tokens", segments)


def over_sequences(values: torch.Tensor, segments: Segments) -> SumAndCount:
    """[N] -> sum over sequences with at least one trained token, and how many there are."""
    total = torch.where(segments.lengths > 0, values, 0.0).sum()
    return total, count_of("sequences", segments)


def over_sequence_means(values: torch.Tensor, segments: Segments) -> SumAndCount:
    """[T] -> sum over sequences of their token means, and the number of sequences."""
    return over_sequences(sequence_mean(values, segments), segments)


def over_constant_length(
    values: torch.Tensor, segments: Segments, length_divisor: float
) -> SumAndCount:
    """[T] -> sum of the sequences' token sums / length_divisor, and the number of sequences."""
    return over_sequences(sequence_sum(values, segments) / length_divisor, segments)
