"""Experts that are split over ranks, gathered on each of them for the time of a rollout."""

from __future__ import annotations

import dataclasses
from typing import Callable

from torch.distributed import ProcessGroup

from megatron_rl.parallel.collectives import gather_first_dim
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
    slices = groups.expert_tensor
    up, down = mixture.up, mixture.down
    if slices.size() > 1:
        # Each rank's rows are a part of the gates above the same part of the ups.
        halves = up.unflatten(1, (2, -1)).permute(2, 0, 1, 3)  # [F, E, 2, D]
        up = gather_first_dim(halves, slices).permute(1, 2, 0, 3).flatten(1, 2)
        down = gather_first_dim(down.permute(2, 0, 1), slices).permute(1, 2, 0)
    up, down = (gather_first_dim(x.contiguous(), groups.expert) for x in (up, down))
    return dataclasses.replace(mixture, up=up, down=down, first=0)


def _share(mixture: Mixture, group: ProcessGroup) -> Mixture:
    rank, size, experts = group.rank(), group.size(), len(mixture.up)
    first, end = experts * rank // size, experts * (rank + 1) // size
    return dataclasses.replace(
        mixture, up=mixture.up[first:end], down=mixture.down[first:end], first=first
    )
