"""Steps that every rank takes and that either succeed everywhere or raise everywhere."""

from __future__ import annotations

from typing import Any, Callable, TypeVar

import torch.distributed as dist
from torch.distributed import ProcessGroup

from megatron_rl.errors import RunFailed, Stopped, UserError

Result = TypeVar("Result")

#: What one rank may meet and the others then raise as well.
_SHARED = (UserError, RunFailed, Stopped, OSError)


def collective_try(group: ProcessGroup, action: Callable[[], Result]) -> list[Result]:
    """Run ``action`` on every rank of the group; a collective.

    A rank whose disk is full would otherwise leave the others waiting in their next collective.

    Returns:
        The ranks' results, in rank order.

    Raises:
        UserError, RunFailed, Stopped, OSError: the first one that any rank met, on all ranks.
    """
    failure: UserError | RunFailed | Stopped | OSError | None = None
    result: Any = None  # of a rank that failed; its outcome is not looked at
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
    """Run ``action`` on the group's first rank alone; its result, on all ranks. A collective, which
    raises as `collective_try` does.
    """
    is_first = group.rank() == 0
    results: list[Any] = collective_try(group, lambda: action() if is_first else None)
    return results[0]
