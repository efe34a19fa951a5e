"""Sums over the ranks of one machine in the memory that they share."""

from __future__ import annotations

from typing import Iterator, Sequence

import torch

from megatron_rl.parallel.shared_memory import SharedMemory


def add_up(tensors: Sequence[torch.Tensor], memory: SharedMemory) -> None:
    """Replace each tensor by its sum over the ranks, in place: the same bits on all. A collective.

    Each rank sums its share of the numbers, and all copy the others' shares.

    Args:
        tensors: fp32 [N], contiguous; of the same sizes on all ranks.
        memory: of these ranks. What does not fit in its slots at once is summed in parts.
    """
    for part in _parts(tensors, len(memory.slots[0])):
        _add_up(part, memory)


def _add_up(part: Sequence[tuple[int, torch.Tensor]], memory: SharedMemory) -> None:
    """The sum of tensors that fit in a slot, each at its place there."""
    me, others, size = memory.rank, memory.others, len(memory.slots)
    # Of each tensor: the ranks' shares of it, and the same in each slot.
    shares = [tensor.tensor_split(size) for _, tensor in part]
    slots = [
        [slot[place : place + len(tensor)].tensor_split(size) for slot in memory.slots]
        for place, tensor in part
    ]
    for share, slot in zip(shares, slots):
        for rank in others:
            slot[me][rank].copy_(share[rank])
    memory.meet()
    for share, slot in zip(shares, slots):
        for rank in others:
            share[me].add_(slot[rank][me])
        slot[me][me].copy_(share[me])
    memory.meet()
    for share, slot in zip(shares, slots):
        for rank in others:
            share[rank].copy_(slot[rank][rank])
    memory.meet()  # all have read: the next part may write


def _parts(tensors: Sequence[torch.Tensor], room: int) -> Iterator[list[tuple[int, torch.Tensor]]]:
    """Pieces of the tensors, as many at once as ``room`` numbers hold, each with its place."""
    part: list[tuple[int, torch.Tensor]] = []
    used = 0
    for tensor in tensors:
        while len(tensor):
            piece, tensor = tensor[: room - used], tensor[room - used :]
            part.append((used, piece))
            used += len(piece)
            if used == room:
                yield part
                part, used = [], 0
    if part:
        yield part
