"""Rewards of answers: judged side by side on each rank, each answer once, all ranks in step."""

from __future__ import annotations

import itertools
import time
import traceback
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Callable, Sequence

from megatron_rl.checkpoint.together import together
from megatron_rl.errors import RunFailed, UserError, one_line
from megatron_rl.observe.console import SilentConsole
from megatron_rl.parallel.collectives import gather_objects
from megatron_rl.parallel.waiting import wait_together
from megatron_rl.records import Prompt, RolloutGroup
from megatron_rl.rewards.base import Reward, Verifier
from megatron_rl.rollout.collect import ScoredGroup

if TYPE_CHECKING:
    from megatron_rl.parallel.groups import Groups

#: A log without a progress display is told of a wait after this long, then after twice as long...
_FIRST_NOTE_S = 60.0


class RewardWorkers:
    """A verifier on all ranks.

    Ranks of one tensor-, pipeline- or context-parallel group hold the same answers: each judges its
    share of them and has the others' verdicts from them, so that all train on the same rewards.

    A verifier bounds the time of an answer by itself; of n answers on a rank none is waited for
    longer than n / threads times that bound.
    """

    def __init__(
        self,
        name: str,
        verifier: Verifier,
        threads: int,
        groups: Groups,
        console: SilentConsole,
        stop: Callable[[], bool] = lambda: False,
    ) -> None:
        """
        Args:
            name: of the verifier, for messages.
            verifier: see there; of this rank's answers so many are judged at once as:
            threads: cores of this rank. A call uses one process at most.
            groups: process groups.
            console: told which rank is waited for.
            stop: whether this rank has heard that the run is to stop.
        """
        self._name, self._verifier, self._threads = name, verifier, threads
        self._groups, self._console, self._stop = groups, console, stop

    def score(self, groups: Sequence[RolloutGroup]) -> list[ScoredGroup]:
        """The groups of this rank's prompts with a reward for each answer. A collective over all
        ranks.

        Raises:
            UserError: a record lacks what the verifier needs; RunFailed: the verifier raised. Both
                on all ranks. Stopped: a signal asked the run to stop; on all ranks.
        """
        answers = [(group.prompt, answer.text) for group in groups for answer in group.completions]
        model, context = self._groups.model, self._groups.context
        peers = model.size() * context.size()
        mine = self._judge(answers[model.rank() + model.size() * context.rank() :: peers])
        rows = gather_objects(gather_objects(mine, model), context)
        rewards: list[Any] = [None] * len(answers)
        for place, share in enumerate(itertools.chain.from_iterable(rows)):
            rewards[place::peers] = share
        given = iter(rewards)
        return [
            ScoredGroup(group, tuple(next(given) for _ in group.completions)) for group in groups
        ]

    def _judge(self, answers: Sequence[tuple[Prompt, str]]) -> list[Reward]:
        world = self._groups.world
        executor = ThreadPoolExecutor(self._threads, "rewards")
        try:
            futures = [executor.submit(self._reward, *answer) for answer in answers]
            show = _Progress(self._console, world.size())
            if wait_together(futures, world, show, stop=self._stop):
                together(world, lambda: self._raise_first(futures, answers))
            return [future.result() for future in futures]
        finally:
            executor.shutdown(wait=False, cancel_futures=True)

    def _reward(self, prompt: Prompt, text: str) -> Reward:
        reward = self._verifier(prompt.record, text)
        if not isinstance(reward, Reward):
            raise TypeError(f"it returned {type(reward).__name__}, not a Reward")
        return reward

    def _raise_first(
        self, futures: Sequence[Future], answers: Sequence[tuple[Prompt, str]]
    ) -> None:
        for future, (prompt, _) in zip(futures, answers, strict=True):
            error = future.exception() if future.done() else None
            if isinstance(error, UserError):
                raise error
            if error is not None:
                place = traceback.extract_tb(error.__traceback__)[-1]
                raise RunFailed(
                    f"the verifier {self._name!r} raised {one_line(error)} "
                    f"({place.filename}:{place.lineno}) on an answer to problem {prompt.index} "
                    "(from 0); expected a reward for every answer; correct the verifier"
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
