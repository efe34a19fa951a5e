"""Carries each micro-batch's running distance from stage to stage, beside the activations.

A stage needs to add only its own layers' sum (or maximum): 4 bytes a token and boundary, no gather
of traces, no second forward pass. A quantile over layers cannot be carried in one number: there
every stage appends its layers' distances, and a boundary passes 4 bytes a token for each MoE layer
before it, at most 4 L. Sends do not block and receives match in order: both schedules of Megatron
(1F1B and interleaved) run the forward passes of a stage pair in the same order on either side, so a
channel (one direction between neighbours) is a queue.
"""

from __future__ import annotations

from typing import Callable, Sequence

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup


class DistanceRelay:
    """The side channel of one rank. With one stage and one chunk nothing is sent."""

    def __init__(
        self,
        group: ProcessGroup,
        num_chunks: int,
        layers: str = "mean",
        layers_before: Sequence[int] = (),
    ) -> None:
        """
        Args:
            group: a process group of the pipeline's ranks that nothing else uses.
            num_chunks: virtual stages per rank.
            layers: "mean": the running value is the sum over the layers so far; "max": the largest;
                "quantile": all of them, one behind the other.
            layers_before: for "quantile", the MoE layers before each of this rank's chunks.
        """
        self._group = group
        self._num_chunks = num_chunks
        ways: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
            "mean": torch.add,
            "max": torch.maximum,
            "quantile": _append,
        }
        self._combine = ways[layers]
        self._layers_before = tuple(layers_before)
        self._pending: list[tuple[dist.Work, torch.Tensor]] = []
        self._waiting: list[torch.Tensor] = []
        if layers == "quantile" and len(self._layers_before) != num_chunks:
            raise ValueError(f"{num_chunks} chunks; layers_before is {self._layers_before}")
        self._appends = layers == "quantile"

    def pass_on(self, chunk: int, distance: torch.Tensor) -> torch.Tensor | None:
        """Add this chunk's distances to the running value of its micro-batch.

        Args:
            chunk: index of the model chunk that ran.
            distance: [T_local], sum or maximum over the chunk's layers; for "quantile" each
                layer's, [L_chunk, T_local], possibly of no layer.

        Returns:
            The same of all layers, [T_local] or [L, T_local], on the last chunk of the last stage;
            None elsewhere, after sending it on.
        """
        stage, stages = self._group.rank(), self._group.size()
        total = distance.float().contiguous()
        shape: tuple[int, ...] = total.shape
        if self._appends:
            shape = (self._layers_before[chunk], *shape[1:])
        if (stage > 0 or chunk > 0) and 0 not in shape:
            total = self._combine(
                self._receive((stage - 1) % stages, total.new_empty(shape)), total
            )
        if stage == stages - 1 and chunk == self._num_chunks - 1:
            return total
        if total.numel():  # no layer so far: nothing to say, and the other side knows
            self._send((stage + 1) % stages, total)
        return None

    def _receive(self, source: int, received: torch.Tensor) -> torch.Tensor:
        if self._group.size() == 1:
            return self._waiting.pop(0)
        dist.recv(received, src=dist.get_global_rank(self._group, source), group=self._group)
        return received

    def _send(self, target: int, total: torch.Tensor) -> None:
        if self._group.size() == 1:
            self._waiting.append(total)
            return
        rank = dist.get_global_rank(self._group, target)
        work = dist.isend(total, dst=rank, group=self._group)
        assert work is not None, "this rank is in its own group"
        self._pending.append((work, total))

    def finish(self) -> None:
        """Wait for all sends; call once the schedule has ended."""
        for work, _ in self._pending:
            work.wait()
        self._pending.clear()


def _append(before: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    return torch.cat([before, own])
