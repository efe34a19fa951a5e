"""Conversations with an environment: an engine whose completions have several turns."""

from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, Callable, Mapping, Protocol, Sequence

import numpy as np

from megatron_rl.parallel.collective_try import collective_try
from megatron_rl.parallel.collectives import gather_objects, shared_out
from megatron_rl.parallel.groups import Groups
from megatron_rl.parallel.waiting import wait_together
from megatron_rl.records import Completion, Prompt, RolloutGroup
from megatron_rl.rollout.engine import Engine, SamplingSettings
from megatron_rl.rollout.first_error import raise_first
from megatron_rl.rollout.turns import join_turns


class Environment(Protocol):
    """What replies to the policy: a function of the problem and of the conversation so far.

    It must give the same reply to the same arguments. Several threads call it.
    """

    def __call__(self, record: Mapping[str, Any], turns: Sequence[str]) -> str | None:
        """The reply to the last turn; None: the conversation is over.

        Args:
            record: the problem.
            turns: the texts so far, of the policy and the environment in alternation. The first and
                the last are the policy's.
        """
        ...


@dataclass
class _Conversation:
    """A conversation that began with one answer to a prompt."""

    prompt: Prompt
    number: int  #: of that answer; it selects the random numbers
    answers: list[Completion]
    replies: list[np.ndarray] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)

    @property
    def tokens(self) -> np.ndarray:
        """The prompt and all turns so far, int64."""
        turns = itertools.zip_longest(self.answers, self.replies)
        parts = [part for answer, reply in turns for part in (answer.tokens, reply)]
        return np.concatenate([self.prompt.tokens, *(part for part in parts if part is not None)])

    def joined(self) -> Completion:
        """The turns as one completion."""
        if len(self.answers) == 1:
            return self.answers[0]
        return join_turns(self.answers, self.replies, self.texts)


class ConversationEngine:
    """`Engine` whose answers are conversations: an environment replies to another engine's answers,
    and the policy answers again.

    A conversation ends when the environment returns None, after ``max_turns`` answers, with an
    answer that was cut off, or if a reply leaves no room for another answer of ``max_new_tokens``.
    A reply without an answer behind it is dropped, because nothing learns from it.
    """

    def __init__(
        self,
        engine: Engine,
        environment: Environment,
        name: str,
        encode: Callable[[str], Sequence[int]],
        max_turns: int,
        max_sequence_length: int,
        groups: Groups,
        threads: int,
        stop: Callable[[], bool] = lambda: False,
    ) -> None:
        """
        Args:
            engine: samples every turn. `close` closes it too.
            environment: called on one of the ranks that hold a conversation.
            name: of the environment, for messages.
            encode: a reply's text to token ids.
            max_turns: most answers of a conversation, >= 1.
            max_sequence_length: longest prompt and completion together, tokens.
            groups: process groups.
            threads: most calls of the environment at once on this rank.
            stop: whether this rank has heard that the run is to stop.
        """
        self.engine, self._environment, self._name = engine, environment, name
        self._encode, self._max_turns = encode, max_turns
        self._max_sequence_length = max_sequence_length
        self._groups, self._threads, self._stop = groups, threads, stop

    def generate(self, prompts: Sequence[Prompt], settings: SamplingSettings) -> list[RolloutGroup]:
        """See `Engine`. A collective over all ranks.

        Raises:
            RunFailed: the environment raised an error, or returned neither a text nor None; on all
                ranks.
        """
        return self.begin(prompts, settings)()

    def begin(
        self, prompts: Sequence[Prompt], settings: SamplingSettings
    ) -> Callable[[], list[RolloutGroup]]:
        """See `Engine`. Only the first turn is sampled in the background."""
        first = self.engine.begin(prompts, settings)
        return lambda: self._converse(first(), settings)

    @property
    def version(self) -> int:
        """See `Engine`."""
        return self.engine.version

    def weights_changed(self) -> None:
        """See `Engine`."""
        self.engine.weights_changed()

    def metrics(self) -> dict[str, float]:
        """See `Engine`."""
        return self.engine.metrics()

    def close(self) -> None:
        """See `Engine`."""
        self.engine.close()

    def _converse(
        self, groups: Sequence[RolloutGroup], settings: SamplingSettings
    ) -> list[RolloutGroup]:
        talks = [
            _Conversation(
                group.prompt,
                group.prompt.first_sample(settings.samples) + number,
                [answer],
                texts=[answer.text],
            )
            for group in groups
            for number, answer in enumerate(group.completions)
        ]
        room = self._max_sequence_length - settings.max_new_tokens
        going = talks
        for turn in range(1, self._max_turns):
            going = [talk for talk in going if talk.answers[-1].finished]
            going = self._replied(going, room)
            if not any(gather_objects(bool(going), self._groups.world)):
                break
            again = replace(settings, samples=1, seed=turn_seed(settings.seed, turn))
            answered = self.engine.generate([_as_prompt(talk) for talk in going], again)
            for talk, group in zip(going, answered, strict=True):
                (answer,) = group.completions
                talk.answers.append(answer)
                talk.texts.append(answer.text)
        completions = (talk.joined() for talk in talks)
        return [
            RolloutGroup(group.prompt, tuple(next(completions) for _ in group.completions))
            for group in groups
        ]

    def _replied(self, talks: Sequence[_Conversation], room: int) -> list[_Conversation]:
        """Add the environment's replies; the conversations that go on. A collective.

        Args:
            talks: conversations that end with an answer.
            room: longest conversation that another answer fits behind, tokens.
        """
        replies = shared_out(talks, self._ask, self._groups.model, self._groups.context)
        going = []
        for talk, text in zip(talks, replies, strict=True):
            ids = [] if text is None else self._encode(text)
            if text is None or len(talk.tokens) + len(ids) > room:
                continue
            talk.replies.append(np.array(ids, dtype=np.int64))
            talk.texts.append(text)
            going.append(talk)
        return going

    def _ask(self, talks: Sequence[_Conversation]) -> list[str | None]:
        """The environment's replies. A collective."""

        def describe(number: int, error: str) -> str:
            return (
                f"the environment {self._name!r} raised {error} on problem "
                f"{talks[number].prompt.index} (from 0); expected a text, or None; correct the "
                "environment"
            )

        world = self._groups.world
        executor = ThreadPoolExecutor(self._threads, "environment")
        try:
            calls = [
                executor.submit(_reply, self._environment, talk.prompt.record, tuple(talk.texts))
                for talk in talks
            ]
            if wait_together(calls, world, stop=self._stop):
                collective_try(world, lambda: raise_first(calls, describe))
            return [call.result() for call in calls]
        finally:
            executor.shutdown(wait=False, cancel_futures=True)


def _reply(environment: Environment, record: Mapping[str, Any], turns: Sequence[str]) -> str | None:
    found = environment(record, turns)
    if not isinstance(found, (str, type(None))):
        raise TypeError(f"it returned {type(found).__name__}, not a text")
    return found


def turn_seed(seed: int, turn: int) -> int:
    """Seed of the answers of a turn, in [0, 2^63).

    Args:
        seed: of the first answers.
        turn: number of answers before, >= 1.
    """
    state = np.random.SeedSequence([seed, turn]).generate_state(1, np.uint64)
    return int(state[0] >> np.uint64(1))


def _as_prompt(talk: _Conversation) -> Prompt:
    """The conversation as the prompt of its next answer."""
    text = talk.prompt.text + "".join(talk.texts)
    return replace(talk.prompt, tokens=talk.tokens, text=text, occurrence=talk.number)
