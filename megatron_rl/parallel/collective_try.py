"""Collective tries: steps that succeed on every rank or raise on every rank."""

from __future__ import annotations

from typing import Any, Callable, TypeVar

import torch.distributed as dist
from torch.distributed import ProcessGroup

from megatron_rl.errors import RunFailed, Stopped, UserError

Result = TypeVar("Result")

#: Errors of one rank that all other ranks raise as well.
_SHARED = (UserError, RunFailed, Stopped, OSError)


def collective_try(group: ProcessGroup, action: Callable[[], Result]) -> list[Result]:
    """Run ``action`` on every rank of the group. A collective.

    A rank whose disk is full would otherwise leave the others waiting in their next collective.

    Returns:
        The ranks' results, in rank order.

    Raises:
        UserError, RunFailed, Stopped, OSError: the error of the first rank that failed, on all
            ranks.
    """
    failure: UserError | RunFailed | Stopped | OSError | None = None
    result: Any = None  # the rank failed; its outcome is not read
    try:
        result = action()
    except _SHARED as error:
        failure = error
    if group.size() == 1:
        if failure is not None:
            raise failure
        return [result]
    outcomes: list[Any] = [None] * group.size()
    message = None if failure is None else (type(failure), str(failure))
    dist.all_gather_object(outcomes, (message, result), group=group)
    for rank, (other, _) in enumerate(outcomes):
        if other is None:
            continue
        if failure is not None and rank == group.rank():
            raise failure
        kind, text = other
        raise OSError(f"rank {rank}: {text}") if issubclass(kind, OSError) else kind(text)
    return [value for _, value in outcomes]


def by_first(group: ProcessGroup, action: Callable[[], Result]) -> Result:
    """Run ``action`` on the group's first rank only and return its result on all ranks. A
    collective; raises as `collective_try` does.
    """
    is_first = group.rank() == 0
    results: list[Any] = collective_try(group, lambda: action() if is_first else None)
    return results[0]
