"""Carries each micro-batch's running distance from stage to stage, beside the activations.

A stage joins its own layers' distances to the running value of the stages before, by the
`LayerRule` of the run. For the mean and the maximum that is one number: 4 bytes a token and
boundary, no gather of traces, no second forward pass. For a quantile it is every distance so far:
4 bytes for each MoE layer before the boundary, at most 4 L. Sends do not block, and a receive
begins before the forward pass whose distances it is joined with. They match in order: both
schedules of Megatron (1F1B and interleaved) run the forward passes of a stage pair in the same
order on either side, so a channel (one direction between neighbours) is a queue.
"""

from __future__ import annotations

from typing import Sequence

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from megatron_rl.algorithms.layer_rules import LayerRule


class DistanceRelay:
    """The side channel of one rank. With one stage and one chunk nothing is sent."""

    def __init__(self, group: ProcessGroup, rule: LayerRule, layers_before: Sequence[int]) -> None:
        """
        Args:
            group: a process group of the pipeline's ranks that nothing else uses.
            rule: how the distances of the layers become one.
            layers_before: of each of this rank's chunks (virtual stages), the number of MoE layers
                in front of it.
        """
        self.rule = rule
        self._group = group
        self._layers_before = tuple(layers_before)
        self._pending: list[tuple[dist.Work, torch.Tensor]] = []
        self._waiting: list[torch.Tensor] = []
        self._coming: tuple[dist.Work, torch.Tensor] | None = None

    def expect(self, chunk: int, num_tokens: int, device: torch.device) -> None:
        """Begin to receive the running value of a micro-batch that is about to run through a chunk.

        Args:
            chunk: its index.
            num_tokens: T_local.
            device: of the value.
        """
        if self._group.size() == 1 or not self._has_value_before(chunk, num_tokens):
            return
        shape = (self.rule.rows(self._layers_before[chunk]), num_tokens)
        coming = torch.empty(shape, dtype=torch.float32, device=device)
        source = (self._group.rank() - 1) % self._group.size()
        work = dist.irecv(coming, src=dist.get_global_rank(self._group, source), group=self._group)
        assert work is not None, "this rank is in its own group"
        self._coming = work, coming

    def pass_on(self, chunk: int, distances: torch.Tensor) -> torch.Tensor | None:
        """Join this chunk's distances to the running value of its micro-batch; after `expect`.

        Args:
            chunk: index of the model chunk that ran.
            distances: of each MoE layer of the chunk, possibly none, [L_chunk, T_local].

        Returns:
            The total of all layers, [T_local], on the last chunk of the last stage; None elsewhere,
            after sending the running value on.
        """
        stage, stages = self._group.rank(), self._group.size()
        running = self.rule.running(distances.float())
        before = self._received(chunk, distances.shape[1])
        if before is not None:
            running = self.rule.join(before, running)
        if stage == stages - 1 and chunk == len(self._layers_before) - 1:
            return self.rule.total(running)
        if running.numel():  # nothing to send before the first layer, and the other side knows
            self._send((stage + 1) % stages, running.detach().contiguous())
        return None

    def _has_value_before(self, chunk: int, num_tokens: int) -> bool:
        first = self._group.rank() == 0 and chunk == 0
        return not first and self.rule.rows(self._layers_before[chunk]) * num_tokens > 0

    def _received(self, chunk: int, num_tokens: int) -> torch.Tensor | None:
        if not self._has_value_before(chunk, num_tokens):
            return None
        if self._group.size() == 1:
            return self._waiting.pop(0)
        assert self._coming is not None, "expect comes before"
        work, received = self._coming
        self._coming = None
        work.wait()
        return received

    def _send(self, target: int, running: torch.Tensor) -> None:
        if self._group.size() == 1:
            self._waiting.append(running)
            return
        rank = dist.get_global_rank(self._group, target)
        work = dist.isend(running, dst=rank, group=self._group)
        assert work is not None, "this rank is in its own group"
        self._pending.append((work, running))

    def finish(self) -> None:
        """Wait for all sends; call once the schedule has ended."""
        for work, _ in self._pending:
            work.wait()
        self._pending.clear()
