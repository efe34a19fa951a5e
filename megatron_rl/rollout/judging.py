"""Verdicts with a deadline: of ``async def`` verifiers, and of others in threads of their own."""

from __future__ import annotations

import asyncio
import functools
import threading
from concurrent.futures import Future
from dataclasses import replace
from types import TracebackType
from typing import Any, Callable, Mapping

from megatron_rl.rewards.base import Reward
from megatron_rl.rewards.chosen import Judge

#: Most threads of a judge that go on after their deadline, on a rank; one more ends the run.
MOST_STUCK = 32


class Verdicts:
    """Begins judgements of one judge that has a deadline. A verdict that comes too late is worth 0,
    and its part ``late`` is 1; that of the others is 0.

    A call of an ``async def`` that does not come back in time is cancelled. A thread cannot be: it
    goes on for nothing, and another takes its place. Code that keeps the interpreter to itself (a
    regular expression that backtracks for ever, ``time.sleep`` in an ``async def``) is not
    interrupted by any deadline.
    """

    def __init__(self, judge: Judge, threads: int) -> None:
        """threads: most calls at once of a judge that is no ``async def``."""
        self._judge = judge
        self._places = asyncio.Semaphore(judge.at_once if judge.is_async else threads)
        self._stuck: list[Future[Any]] = []
        self.late = 0  #: verdicts that came too late

    def begin(self, record: Mapping[str, Any], text: str) -> Future[Reward]:
        """The verdict on an answer, to be waited for."""
        return asyncio.run_coroutine_threadsafe(self._verdict(record, text), _loop())

    async def _verdict(self, record: Mapping[str, Any], text: str) -> Reward:
        judge = self._judge
        async with self._places:
            given = None if judge.is_async else self._in_a_thread(record, text)
            work: Any  # an awaitable: only an ``async def`` is called here
            work = judge.verifier(record, text) if given is None else asyncio.wrap_future(given)
            task = asyncio.ensure_future(work)
            try:
                done, _ = await asyncio.wait({task}, timeout=judge.deadline_s)
            finally:
                task.cancel()  # nothing, once it is done
        if done:
            reward = checked(task.result())
            return replace(reward, parts={**reward.parts, "late": 0.0})
        self.late += 1
        if given is not None:
            self._stuck.append(given)
        return Reward(0.0, {"late": 1.0}, f"no verdict within {judge.deadline_s:g} s")

    def _in_a_thread(self, record: Mapping[str, Any], text: str) -> Future[Any]:
        self._stuck = [call for call in self._stuck if not call.done()]
        if len(self._stuck) >= MOST_STUCK:
            raise TimeoutError(
                f"{len(self._stuck)} calls have not come back since their deadline of "
                f"{self._judge.deadline_s:g} s"
            )
        given: Future[Any] = Future()
        given.set_running_or_notify_cancel()
        work = functools.partial(_give, given, self._judge.verifier, record, text)
        # A thread of its own, which the end of the process does not wait for.
        threading.Thread(target=work, daemon=True, name="reward").start()
        return given


def checked(found: Any) -> Reward:
    """What a verifier gave, if it is a reward. TypeError: it is none."""
    if not isinstance(found, Reward):
        raise TypeError(f"it returned {type(found).__name__}, not a Reward")
    return found


def _give(given: Future[Any], function: Callable[..., Any], *arguments: Any) -> None:
    with _Failure(given):
        given.set_result(function(*arguments))


class _Failure:
    """Context whose exception goes to a future, as that of an executor's thread does."""

    def __init__(self, future: Future[Any]) -> None:
        self._future = future

    def __enter__(self) -> None:
        return None

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> bool:
        if error is not None:
            self._future.set_exception(error)
        return True


@functools.lru_cache(maxsize=1)
def _loop() -> asyncio.AbstractEventLoop:
    """The loop of all judgements of this process: a verifier may keep connections between them."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, daemon=True, name="rewards loop").start()
    return loop
