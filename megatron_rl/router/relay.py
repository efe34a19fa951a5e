"""Carries each micro-batch's running distance from stage to stage, beside the activations.
 A stage needs to add only its own layers' sum: 4 bytes a token and boundary, no gather of traces,
no second forward pass. Sends do not block and receives match in order: both schedules of Megatron
(1F1B and interleaved) run the forward passes of a stage pair in the same order on either side, so a
channel (one direction between neighbours) is a queue.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup


class DistanceRelay:
    """The side channel of one rank. With one stage and one chunk nothing is sent."""

    def __init__(self, group: ProcessGroup, num_chunks: int, layers: str = "mean") -> None:
        """
        Args:
            group: a process group of the pipeline's ranks that nothing else uses.
            num_chunks: virtual stages per rank.
            layers: "mean": the running value is the sum over the layers so far; "max": the largest.
        """
        self._group = group
        self._num_chunks = num_chunks
        self._combine = {"mean": torch.add, "max": torch.maximum}[layers]
        self._pending: list[tuple[dist.Work, torch.Tensor]] = []
        self._waiting: list[torch.Tensor] = []

    def pass_on(self, chunk: int, distance: torch.Tensor) -> torch.Tensor | None:
        """Add this chunk's distances [T_local] to the running sum (maximum) of its micro-batch.

        Returns:
            The sum (maximum) over all layers on the last chunk of the last stage; None elsewhere,
            after sending it on.
        """
        stage, stages = self._group.rank(), self._group.size()
        total = distance.float().contiguous()
        if stage > 0 or chunk > 0:
            total = self._combine(total, self._receive((stage - 1) % stages, total))
        if stage == stages - 1 and chunk == self._num_chunks - 1:
            return total
        self._send((stage + 1) % stages, total)
        return None

    def _receive(self, source: int, like: torch.Tensor) -> torch.Tensor:
        if self._group.size() == 1:
            return self._waiting.pop(0)
        received = torch.empty_like(like)
        dist.recv(received, src=dist.get_global_rank(self._group, source), group=self._group)
        return received

    def _send(self, target: int, total: torch.Tensor) -> None:
        if self._group.size() == 1:
            self._waiting.append(total)
            return
        rank = dist.get_global_rank(self._group, target)
        self._pending.append((dist.isend(total, dst=rank, group=self._group), total))

    def finish(self) -> None:
        """Wait for all sends; call once the schedule has ended."""
        for work, _ in self._pending:
            work.wait()
        self._pending.clear()
