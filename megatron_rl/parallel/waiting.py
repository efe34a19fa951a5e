"""Wait on all ranks for work of unequal length, without taking a slow rank for a lost one."""

from __future__ import annotations

from concurrent.futures import ALL_COMPLETED, FIRST_EXCEPTION, Future, wait
from typing import Any, Callable, Sequence

from torch.distributed import ProcessGroup

from megatron_rl.errors import Stopped
from megatron_rl.parallel.collectives import gather_objects

#: Seconds between two exchanges; far below any timeout of a collective.
TICK_S = 1.0


def wait_together(
    futures: Sequence[Future[Any]],
    group: ProcessGroup,
    show: Callable[[int, int, int], None] = lambda rank, done, total: None,
    *,
    to_the_end: bool = False,
    stop: Callable[[], bool] = lambda: False,
) -> bool:
    """Wait until every rank's futures are done, or one of any rank has raised. A collective.

    The ranks exchange their progress every ``TICK_S``. So no rank waits longer than that in a
    collective while another works in threads, and a dead rank is noticed as in any collective.

    Args:
        futures: of this rank; may be empty.
        group: the ranks that wait for each other.
        show: called at every exchange but the last with the slowest rank: rank, done, total.
        to_the_end: keep waiting for the others after one has raised.
        stop: True once this rank knows that the wait can end.

    Returns:
        Whether one has raised; the same on every rank.

    Raises:
        Stopped: on every rank, if ``stop`` was True on one before all futures were done.
    """
    while True:
        wait(futures, timeout=TICK_S, return_when=ALL_COMPLETED if to_the_end else FIRST_EXCEPTION)
        done = [future for future in futures if future.done()]
        raised = any(future.exception() is not None for future in done)
        states = gather_objects((len(done), len(futures), raised, stop()), group)
        left = [total - done for done, total, _, _ in states]
        failed = any(raised for _, _, raised, _ in states)
        if not any(left) or (failed and not to_the_end):
            return failed
        if any(stopped for *_, stopped in states):
            raise Stopped
        rank = left.index(max(left))
        show(rank, *states[rank][:2])
