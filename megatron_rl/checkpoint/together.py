"""Steps that every rank takes and that either succeed everywhere or raise everywhere."""

from __future__ import annotations

from typing import Callable, TypeVar

import torch.distributed as dist
from torch.distributed import ProcessGroup

from megatron_rl.errors import UserError

Result = TypeVar("Result")


def together(group: ProcessGroup, action: Callable[[], Result]) -> list[Result]:
    """Run ``action`` on every rank of the group; a collective.

    A rank whose disk is full would otherwise leave the others waiting in their next collective.

    Returns:
        The ranks' results, in rank order.

    Raises:
        UserError, OSError: the first one that any rank met, on all ranks.
    """
    failure, result = None, None
    try:
        result = action()
    except (UserError, OSError) as error:
        failure = error
    if group.size() == 1:
        if failure is not None:
            raise failure
        return [result]
    outcomes: list = [None] * group.size()
    message = None if failure is None else (isinstance(failure, UserError), str(failure))
    dist.all_gather_object(outcomes, (message, result), group=group)
    for rank, (other, _) in enumerate(outcomes):
        if other is None:
            continue
        if failure is not None and rank == group.rank():
            raise failure
        by_user, text = other
        raise UserError(text) if by_user else OSError(f"rank {rank}: {text}")
    return [value for _, value in outcomes]
