"""Rewards of answers: all ranks judge at the same time, and each answer is judged once."""

from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Callable, Mapping, Sequence

from megatron_rl.observe.console import SilentConsole
from megatron_rl.parallel.collective_try import collective_try
from megatron_rl.parallel.collectives import shared_out
from megatron_rl.parallel.waiting import wait_together
from megatron_rl.records import Prompt, RolloutGroup
from megatron_rl.rewards.base import Reward
from megatron_rl.rewards.chosen import Judge, combine
from megatron_rl.rollout.collect import ScoredGroup
from megatron_rl.rollout.first_error import raise_first
from megatron_rl.rollout.judging import Verdicts, checked

if TYPE_CHECKING:
    from megatron_rl.parallel.groups import Groups

#: Seconds of waiting before a log without a progress display gets a note; twice as long for each
#: further note.
_FIRST_NOTE_S = 60.0


class RewardWorkers:
    """The verifiers on all ranks.

    Ranks of one tensor-, pipeline- or context-parallel group hold the same answers. Each judges a
    share of them, and they exchange the verdicts. So all train on the same rewards.

    A verifier without a deadline has to limit its own time. A rank with n answers waits at most
    n / threads times that limit.
    """

    def __init__(
        self,
        judges: Sequence[Judge],
        threads: int,
        groups: Groups,
        console: SilentConsole,
        stop: Callable[[], bool] = lambda: False,
    ) -> None:
        """
        Args:
            judges: the verifiers.
            threads: most calls at once of verifiers that are not ``async def``: the cores of this
                rank, since a call uses at most one process.
            groups: process groups.
            console: shows which rank is waited for.
            stop: whether this rank has heard that the run is to stop.
        """
        self._judges, self._threads = judges, threads
        self._groups, self._console, self._stop = groups, console, stop

    def score(self, groups: Sequence[RolloutGroup]) -> list[ScoredGroup]:
        """Judge the answers of this rank's groups. A collective over all ranks.

        Raises:
            UserError: a record lacks what the verifier needs; on all ranks. RunFailed: the verifier
                raised an error; on all ranks. Stopped: a signal asked the run to stop; on all
                ranks.
        """
        answers = [
            (group.prompt, answer.judged_text) for group in groups for answer in group.completions
        ]
        shared = self._groups.model, self._groups.context
        given = iter(shared_out(answers, self._judge, *shared))
        return [
            ScoredGroup(group, tuple(next(given) for _ in group.completions)) for group in groups
        ]

    def _judge(self, answers: Sequence[tuple[Prompt, str]]) -> list[Reward]:
        world = self._groups.world
        executor = ThreadPoolExecutor(self._threads, "rewards")
        timed = {
            judge: Verdicts(judge, self._threads)
            for judge in self._judges
            if judge.deadline_s is not None
        }
        futures: list[Future[Reward]] = []
        calls: list[tuple[Judge, Prompt]] = []  #: the judge and the problem of each future

        def describe(number: int, error: str) -> str:
            judge, prompt = calls[number]
            return (
                f"the verifier {judge.name!r} raised {error} on an answer to problem "
                f"{prompt.index} (from 0); expected a reward for every answer; correct the verifier"
            )

        try:
            for prompt, text in answers:
                for judge in self._judges:
                    if judge in timed:
                        future = timed[judge].begin(prompt.record, text)
                    else:
                        future = executor.submit(_reward, judge, prompt.record, text)
                    futures.append(future)
                    calls.append((judge, prompt))
            show = _Progress(self._console, world.size())
            if wait_together(futures, world, show, stop=self._stop):
                collective_try(world, lambda: raise_first(futures, describe))
            self._warn_late(timed, len(answers))
            verdicts = iter(future.result() for future in futures)
            return [combine(self._judges, [next(verdicts) for _ in self._judges]) for _ in answers]
        finally:
            executor.shutdown(wait=False, cancel_futures=True)
            for future, (judge, _) in zip(futures, calls):
                if judge in timed:
                    future.cancel()  # does nothing if it is done

    def _warn_late(self, timed: Mapping[Judge, Verdicts], answers: int) -> None:
        for judge, verdicts in timed.items():
            if verdicts.late:
                self._console.warn(
                    f"the verifier {judge.name!r} gave no verdict within {judge.deadline_s:g} s on "
                    f"{verdicts.late} of {answers} answers of this rank: reward 0"
                )


def _reward(judge: Judge, record: Mapping[str, Any], text: str) -> Reward:
    return checked(judge.verifier(record, text))


class _Progress:
    """Shows which rank is waited for: always on a progress display, now and then in a log."""

    def __init__(self, console: SilentConsole, ranks: int) -> None:
        self._console, self._ranks = console, ranks
        self._start, self._next_note_s = time.monotonic(), _FIRST_NOTE_S

    def __call__(self, rank: int, done: int, total: int) -> None:
        who = f"rewards, rank {rank}" if self._ranks > 1 else "rewards"
        text = f"{who}: {done} of {total}"
        self._console.phase(text)
        seconds = time.monotonic() - self._start
        if seconds >= self._next_note_s:
            self._next_note_s = 2 * seconds
            self._console.note(f"waiting for {text} after {seconds:.0f} s")
