"""Verdicts with a deadline, of ``async def`` verifiers and of verifiers in threads."""

from __future__ import annotations

import asyncio
import functools
import threading
from concurrent.futures import Future
from dataclasses import replace
from typing import Any, Mapping

from megatron_rl.rewards.base import Reward
from megatron_rl.rewards.chosen import Judge
from megatron_rl.rollout.daemon_thread import in_daemon_thread

#: Most threads of a judge on a rank that still run after their deadline. One more ends the run.
MOST_STUCK = 32


class Verdicts:
    """The verdicts of one judge that has a deadline. A late verdict is the reward 0 with the part
    ``late`` 1. All other verdicts have ``late`` 0.

    A late call of an ``async def`` is cancelled. A thread cannot be cancelled: it runs on, and
    another takes its place. No deadline interrupts code that holds the interpreter, such as a
    regular expression that backtracks for ever, or ``time.sleep`` in an ``async def``.
    """

    def __init__(self, judge: Judge, threads: int) -> None:
        """threads: most calls at once of a judge that is not ``async def``."""
        self._judge = judge
        self._places = asyncio.Semaphore(judge.at_once if judge.is_async else threads)
        self._stuck: list[Future[Any]] = []
        self.late = 0  #: number of late verdicts

    def begin(self, record: Mapping[str, Any], text: str) -> Future[Reward]:
        """Begin to judge an answer.

        Args:
            record: the problem.
            text: the answer.

        Returns:
            A future of the verdict. It holds the verifier's error, or TypeError if the verifier
            returns no `Reward`.
        """
        return asyncio.run_coroutine_threadsafe(self._verdict(record, text), _loop())

    async def _verdict(self, record: Mapping[str, Any], text: str) -> Reward:
        judge = self._judge
        async with self._places:
            given = None if judge.is_async else self._in_a_thread(record, text)
            work: Any  # an awaitable in both cases: a judge without a thread is ``async def``
            work = judge.verifier(record, text) if given is None else asyncio.wrap_future(given)
            task = asyncio.ensure_future(work)
            try:
                done, _ = await asyncio.wait({task}, timeout=judge.deadline_s)
            finally:
                task.cancel()  # does nothing if it is done
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
        return in_daemon_thread(self._judge.verifier, record, text, name="reward")


def checked(found: Any) -> Reward:
    """What a verifier returned. TypeError: it is not a `Reward`."""
    if not isinstance(found, Reward):
        raise TypeError(f"it returned {type(found).__name__}, not a Reward")
    return found


@functools.lru_cache(maxsize=1)
def _loop() -> asyncio.AbstractEventLoop:
    """The event loop of all verdicts in this process, so that a verifier can keep connections."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, daemon=True, name="rewards loop").start()
    return loop
