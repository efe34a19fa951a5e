"""Collectives over an explicit group. In a group of one rank each is the identity and sends
nothing.
"""

from __future__ import annotations

from typing import Any, Callable, Sequence

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup


def all_reduce(
    tensor: torch.Tensor, group: ProcessGroup, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM
) -> torch.Tensor:
    """The reduction of ``tensor`` over the group, as a new tensor. Not differentiable."""
    if group.size() == 1:
        return tensor
    reduced = tensor.detach().clone()
    dist.all_reduce(reduced, op=op, group=group)
    return reduced


def all_max(value: int, group: ProcessGroup, device: torch.device) -> int:
    """The largest of the ranks' integers."""
    if group.size() == 1:
        return value  # does not wait for the device
    return int(all_reduce(torch.tensor(value, device=device), group, dist.ReduceOp.MAX))


def broadcast(tensor: torch.Tensor, group: ProcessGroup, source: int = 0) -> torch.Tensor:
    """The tensor of the group's rank ``source`` on every rank (in place on the others)."""
    if group.size() > 1:
        dist.broadcast(tensor, src=dist.get_global_rank(group, source), group=group)
    return tensor


def gather_objects(value: Any, group: ProcessGroup) -> list[Any]:
    """The picklable values of all ranks, in rank order."""
    if group.size() == 1:
        return [value]
    values: list[Any] = [None] * group.size()
    dist.all_gather_object(values, value, group=group)
    return values


def scatter_objects(values: list[Any] | None, group: ProcessGroup) -> Any:
    """This rank's value of the picklable values that the group's rank 0 gives, one for each
    rank.
    """
    if group.size() == 1:
        assert values is not None, "this rank is the group's rank 0"
        return values[0]
    received: list[Any] = [None]
    source = dist.get_global_rank(group, 0)
    dist.scatter_object_list(received, values, src=source, group=group)
    return received[0]


def broadcast_object(value: Any, group: ProcessGroup) -> Any:
    """The picklable value of the group's rank 0, on every rank."""
    if group.size() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, src=dist.get_global_rank(group, 0), group=group)
    return values[0]


class _GatherFirstDim(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, tensor: torch.Tensor, group: ProcessGroup, sum_gradients: bool
    ) -> torch.Tensor:
        ctx.group, ctx.sum_gradients = group, sum_gradients
        gathered = [torch.empty_like(tensor) for _ in range(group.size())]
        dist.all_gather(gathered, tensor.contiguous(), group=group)
        return torch.cat(gathered)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        slices = grad.contiguous().chunk(ctx.group.size())
        own = slices[ctx.group.rank()]
        if ctx.sum_gradients:
            own = torch.empty_like(own)
            dist.reduce_scatter(own, list(slices), group=ctx.group)
        return own, None, None


def gather_first_dim(
    tensor: torch.Tensor, group: ProcessGroup, *, sum_gradients: bool = False
) -> torch.Tensor:
    """[n, ...] on each rank -> [n * size, ...] in rank order, differentiable.

    ``sum_gradients`` False: all ranks compute the same function of the result, so the backward pass
    takes each rank's slice of its own gradient, without a sum. True: each rank computes a different
    part, and the backward pass sums all ranks' gradients (a collective) and takes the rank's slice.
    """
    if group.size() == 1:
        return tensor
    return _GatherFirstDim.apply(tensor, group, sum_gradients)


def shared_out(
    items: Sequence[Any],
    work: Callable[[Sequence[Any]], list[Any]],
    inner: ProcessGroup,
    outer: ProcessGroup,
) -> list[Any]:
    """Share work among the ranks of two crossing groups that all hold the same items. A collective
    over both groups.

    Args:
        items: the same on every rank.
        work: gives a result for each of this rank's items, which may be none.
        inner: the first of the groups.
        outer: the other.

    Returns:
        The results of all items, in order.
    """
    peers = inner.size() * outer.size()
    mine = work(items[inner.rank() + inner.size() * outer.rank() :: peers])
    results: list[Any] = [None] * len(items)
    shares = [share for row in gather_objects(gather_objects(mine, inner), outer) for share in row]
    for place, share in enumerate(shares):
        results[place::peers] = share
    return results
