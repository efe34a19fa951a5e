"""Megatron's data-parallel wrapper, whose gradients ranks on one machine sum in shared memory."""

from __future__ import annotations

from collections import defaultdict
from typing import Any, Sequence

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from torch.distributed import ProcessGroup

from megatron_rl.models.experts import GRADIENT_IN_PLACE
from megatron_rl.parallel.shared_memory import SharedMemory, share_memory
from megatron_rl.parallel.shared_sum import add_up

#: Bytes of the memory that the ranks of a group share at most: a container has 64 MiB by default.
#: Larger gradients are summed in parts.
MOST_BYTES = 2**24


class DataParallel(DistributedDataParallel):
    """Sums gradients as Megatron does, or as `share_gradients` has arranged."""

    #: gradients, the ranks they are summed over, and the memory that these share
    shared: Sequence[tuple[list[torch.Tensor], ProcessGroup, SharedMemory | None]] | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """As Megatron's. With sums that overlap with the backward pass it wants every gradient."""
        super().__init__(*args, **kwargs)
        for parameter in self.module.parameters():
            setattr(parameter, GRADIENT_IN_PLACE, not self.ddp_config.overlap_grad_reduce)

    def finish_grad_sync(self, force_all_reduce: bool | None = False) -> None:
        """Sum the gradients of a mini-batch over the data-parallel ranks. A collective."""
        if self.shared is None:
            super().finish_grad_sync(force_all_reduce=force_all_reduce)
            return
        for gradients, group, memory in self.shared:
            if memory is not None:
                add_up(gradients, memory)
                continue
            for gradient in gradients:
                dist.all_reduce(gradient, group=group)


def share_gradients(wrapped: Sequence[DataParallel], timeout_s: float) -> None:
    """Let the chunks of this rank sum gradients on a CPU in shared memory, where the ranks have
    some, and send nothing where a rank is alone. A collective.

    Not for a distributed optimizer, nor for sums that overlap with the backward pass.

    Args:
        wrapped: chunks whose gradients are fp32 and not scaled before they are summed.
        timeout_s: ranks wait no longer for each other.
    """
    of_chunks = [chunk.buffers + chunk.expert_parallel_buffers for chunk in wrapped]
    buffers = [buffer for of_chunk in of_chunks for buffer in of_chunk]
    if any(b.grad_data.device.type != "cpu" or b.gradient_scaling_factor != 1.0 for b in buffers):
        return
    groups: dict[tuple[int, ...], ProcessGroup] = {}
    gradients = [defaultdict[tuple[int, ...], list[torch.Tensor]](list) for _ in wrapped]
    for of_ranks, of_chunk in zip(gradients, of_chunks, strict=True):
        for buffer in of_chunk:
            group = buffer.data_parallel_group
            if group.size() > 1:
                ranks = tuple(dist.get_process_group_ranks(group))
                groups.setdefault(ranks, group)
                of_ranks[ranks].append(buffer.grad_data)
    memories = {}
    for ranks, group in groups.items():
        needed = max(sum(g.nbytes for g in of_ranks[ranks]) for of_ranks in gradients)
        slot = min(needed, MOST_BYTES // len(ranks))
        memories[ranks] = share_memory(group, slot, timeout_s)
    for chunk, of_ranks in zip(wrapped, gradients, strict=True):
        chunk.shared = [(of, groups[ranks], memories[ranks]) for ranks, of in of_ranks.items()]
