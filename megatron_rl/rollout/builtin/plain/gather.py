"""Experts that are split over ranks, gathered on each of them for the time of a rollout."""

from __future__ import annotations

import dataclasses
from typing import Callable

from torch.distributed import ProcessGroup

from megatron_rl.models.expert_weights import GatheredMatrix
from megatron_rl.parallel.groups import Groups
from megatron_rl.rollout.builtin.plain.weights import ChunkWeights, Mixture


def with_all_experts(chunk: ChunkWeights, groups: Groups) -> ChunkWeights:
    """The chunk with copies of all experts. A collective of the ranks that split them."""
    return _with_mixtures(chunk, lambda mixture: _gathered(mixture, groups))


def with_own_share(chunk: ChunkWeights, group: ProcessGroup) -> ChunkWeights:
    """The chunk, which has all experts, with only those that this rank of ``group`` shall compute:
    the ranks have the same tokens and add up what their experts give.
    """
    return _with_mixtures(chunk, lambda mixture: _share(mixture, group))


def _with_mixtures(chunk: ChunkWeights, change: Callable[[Mixture], Mixture]) -> ChunkWeights:
    layers = [
        dataclasses.replace(layer, feed_forward=change(layer.feed_forward))
        if isinstance(layer.feed_forward, Mixture)
        else layer
        for layer in chunk.layers
    ]
    return dataclasses.replace(chunk, layers=tuple(layers))


def _gathered(mixture: Mixture, groups: Groups) -> Mixture:
    up, down = (
        GatheredMatrix(weight, groups, gated=gated)
        for weight, gated in ((mixture.up, True), (mixture.down, False))
    )
    return dataclasses.replace(mixture, up=up.whole(), down=down.whole(), first=0)


def _share(mixture: Mixture, group: ProcessGroup) -> Mixture:
    rank, size, experts = group.rank(), group.size(), len(mixture.up)
    first, end = experts * rank // size, experts * (rank + 1) // size
    return dataclasses.replace(
        mixture, up=mixture.up[first:end], down=mixture.down[first:end], first=first
    )
