"""The clip fraction of a step, split by how far the routers had moved."""

from __future__ import annotations

import torch

#: Bins an octave of the distance; a bin is about 9% wide.
BINS_PER_OCTAVE = 8
#: Distances of 2^-20 (rounding noise) to 2^4 nats have bins of their own.
LOWEST_OCTAVE, HIGHEST_OCTAVE = -20, 4
#: One bin for a distance of 0, which all tokens have in the first mini-batch after scoring.
NUM_BINS = 1 + BINS_PER_OCTAVE * (HIGHEST_OCTAVE - LOWEST_OCTAVE)


class ClipSplit:
    """Counts of tokens and of clipped tokens over a histogram of Delta = -log gamma.

    The quartiles of gamma over a step are known only at its end, and quartiles of each pack would
    depend on how sequences are packed. Histograms of packs and ranks add up. The bins are of Delta,
    at equal ratios, because gamma crowds just below 1. Quartiles are exact except in the bin where
    one ends: there the clipped tokens are spread evenly over the tokens of the bin.
    """

    def __init__(self, device: torch.device) -> None:
        self.counts = torch.zeros(2, NUM_BINS, dtype=torch.float64, device=device)

    def add(self, distance: torch.Tensor, clipped: torch.Tensor, mask: torch.Tensor) -> None:
        """Count a pack: Delta fp32 [T], clipped bool [T], mask bool [T] (tokens that count)."""
        octave = distance.clamp(min=2.0**LOWEST_OCTAVE).log2() - LOWEST_OCTAVE
        bins = 1 + (octave * BINS_PER_OCTAVE).clamp(0, NUM_BINS - 2).nan_to_num().long()
        bins = torch.where(distance > 0, bins, 0)
        self.counts.index_add_(1, bins, torch.stack([mask, mask & clipped]).double())


def quartile_fractions(counts: torch.Tensor) -> list[float]:
    """Clip fraction of each quarter of the tokens, from the smallest gamma to the largest.

    counts: [2, bins] of `ClipSplit`, added up over packs and ranks. Without a token: [].
    """
    tokens, clipped = (row.flip(0) for row in counts)  # the largest Delta, smallest gamma, first
    total = tokens.sum()
    if total <= 0:
        return []
    ends = tokens.cumsum(0)
    rates = clipped / tokens.clamp(min=1.0)
    fractions = []
    for quarter in range(4):
        low, high = total * quarter / 4, total * (quarter + 1) / 4
        inside = (ends.clamp(max=high) - (ends - tokens).clamp(min=low)).clamp(min=0.0)
        fractions.append(float((rates * inside).sum() / (total / 4)))
    return fractions
