"""Rewards of answers: judged side by side on each rank, each answer once, all ranks in step."""

from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Callable, Mapping, Sequence

from megatron_rl.catalogue.blame import raised
from megatron_rl.errors import RunFailed, UserError
from megatron_rl.observe.console import SilentConsole
from megatron_rl.parallel.collective_try import collective_try
from megatron_rl.parallel.collectives import shared_out
from megatron_rl.parallel.waiting import wait_together
from megatron_rl.records import Prompt, RolloutGroup
from megatron_rl.rewards.base import Reward
from megatron_rl.rewards.chosen import Judge, combine
from megatron_rl.rollout.collect import ScoredGroup
from megatron_rl.rollout.judging import Verdicts, checked

if TYPE_CHECKING:
    from megatron_rl.parallel.groups import Groups

#: A log without a progress display is told of a wait after this long, then after twice as long...
_FIRST_NOTE_S = 60.0


class RewardWorkers:
    """The verifiers on all ranks.

    Ranks of one tensor-, pipeline- or context-parallel group hold the same answers: each judges its
    share of them and has the others' verdicts from them, so that all train on the same rewards.

    A verifier without a deadline bounds the time of an answer by itself; of n answers on a rank
    none is waited for longer than n / threads times that bound.
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
            threads: cores of this rank: so many answers are judged at once by verifiers that are
                no ``async def``. A call uses one process at most.
            groups: process groups.
            console: told which rank is waited for.
            stop: whether this rank has heard that the run is to stop.
        """
        self._judges, self._threads = judges, threads
        self._groups, self._console, self._stop = groups, console, stop

    def score(self, groups: Sequence[RolloutGroup]) -> list[ScoredGroup]:
        """The groups of this rank's prompts with a reward for each answer. A collective over all
        ranks.

        Raises:
            UserError: a record lacks what the verifier needs; RunFailed: the verifier raised. Both
                on all ranks. Stopped: a signal asked the run to stop; on all ranks.
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
        calls: list[tuple[Future[Reward], Judge, Prompt]] = []
        try:
            for prompt, text in answers:
                for judge in self._judges:
                    if judge in timed:
                        future = timed[judge].begin(prompt.record, text)
                    else:
                        future = executor.submit(_reward, judge, prompt.record, text)
                    calls.append((future, judge, prompt))
            futures = [future for future, _, _ in calls]
            show = _Progress(self._console, world.size())
            if wait_together(futures, world, show, stop=self._stop):
                collective_try(world, lambda: _raise_first(calls))
            self._say_late(timed, len(answers))
            verdicts = iter(future.result() for future in futures)
            return [combine(self._judges, [next(verdicts) for _ in self._judges]) for _ in answers]
        finally:
            executor.shutdown(wait=False, cancel_futures=True)
            for future, judge, _ in calls:
                if judge in timed:
                    future.cancel()  # nothing, once it is done

    def _say_late(self, timed: Mapping[Judge, Verdicts], answers: int) -> None:
        for judge, verdicts in timed.items():
            if verdicts.late:
                self._console.warn(
                    f"the verifier {judge.name!r} gave no verdict within {judge.deadline_s:g} s on "
                    f"{verdicts.late} of {answers} answers of this rank: reward 0"
                )


def _reward(judge: Judge, record: Mapping[str, Any], text: str) -> Reward:
    return checked(judge.verifier(record, text))


def _raise_first(calls: Sequence[tuple[Future[Reward], Judge, Prompt]]) -> None:
    for future, judge, prompt in calls:
        error = future.exception() if future.done() else None
        if isinstance(error, (UserError, RunFailed)):
            raise error
        if error is not None:
            raise RunFailed(
                f"the verifier {judge.name!r} raised {raised(error)} on an answer to problem "
                f"{prompt.index} (from 0); expected a reward for every answer; correct the verifier"
            ) from error


class _Progress:
    """Says which rank is waited for: on a progress display always, in a log now and then."""

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
