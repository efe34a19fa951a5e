"""A record of the tokens that top-p and top-k keep while a batch is generated."""

from __future__ import annotations

from typing import Sequence

import numpy as np
import torch

from megatron_rl.algorithms.kept_tokens import kept_sets
from megatron_rl.parallel.collectives import broadcast_object
from megatron_rl.parallel.groups import Groups
from megatron_rl.records import KeptTokens


class KeptLog:
    """The sets of a batch, on the rank that draws its tokens. Those of each step go to host memory,
    4 bytes an id, which waits for the device.

    Legend: R rows of a step, V vocabulary.
    """

    def __init__(self) -> None:
        self._mask = torch.zeros(0, 0, dtype=torch.bool)
        self._numbers: list[np.ndarray] = []  # of each step
        self._sets: list[KeptTokens] = []

    def mask(self, logits: torch.Tensor) -> torch.Tensor:
        """bool [R, V] for `sampler.draw` to fill, of the first R rows; the next step overwrites it.
        The first step has the most rows.
        """
        if not self._numbers:
            self._mask = torch.zeros(logits.shape, dtype=torch.bool, device=logits.device)
        return self._mask[: len(logits)]

    def add(self, numbers: torch.Tensor) -> None:
        """Take a step's sets. numbers: int64 [R], of the rows in the batch; others are nobody's."""
        mask = self._mask[: len(numbers)]
        self._sets.append(kept_sets(mask, most=mask.shape[1]))
        self._numbers.append(numbers.cpu().numpy().copy())  # rows change places

    def take(self, lengths: Sequence[int]) -> list[KeptTokens]:
        """The sets of every row of the batch, of answers of these lengths."""
        size, steps = np.array(lengths, dtype=np.int64), np.arange(len(self._numbers))
        numbers = np.concatenate([np.zeros(0, dtype=np.int64), *self._numbers])
        step = np.repeat(steps, [len(each) for each in self._numbers])
        # Not wanted: what was drawn behind an answer's end, and rows that are nobody's.
        wanted = np.flatnonzero(step < np.append(size, 0)[np.minimum(numbers, len(size))])
        order = wanted[np.lexsort((step[wanted], numbers[wanted]))]
        every, ends = KeptTokens.join(self._sets), np.cumsum(size)
        return [every.select(order[end - n : end]) for end, n in zip(ends, size)]


def log_of(groups: Groups) -> KeptLog | None:
    """The record of this rank; None: another one of its replica draws the tokens."""
    last = groups.pipeline.rank() == groups.pipeline.size() - 1
    return KeptLog() if last and groups.tensor.rank() == 0 else None


def shared_sets(
    log: KeptLog | None, lengths: Sequence[int], groups: Groups
) -> list[KeptTokens] | None:
    """The sets of every row, on all ranks of the last pipeline stage; None on the others. A
    collective of the tensor-parallel group.
    """
    if groups.pipeline.rank() < groups.pipeline.size() - 1:
        return None
    sets = None if log is None else log.take(lengths)
    shared: list[KeptTokens] = broadcast_object(sets, groups.tensor)
    return shared
