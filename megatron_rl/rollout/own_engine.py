"""A user's own rollout engine: its errors become one line that names it, and its answers are
checked.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Callable, Sequence

import numpy as np

from megatron_rl.catalogue.blame import blame
from megatron_rl.catalogue.entry import EngineEntry
from megatron_rl.catalogue.kinds import ENGINES
from megatron_rl.errors import UserError
from megatron_rl.parallel.collective_try import collective_try
from megatron_rl.records import Completion, KeptTokens, Prompt, RolloutGroup, RoutedExperts
from megatron_rl.rollout.engine import Engine, EngineParts, SamplingSettings
from megatron_rl.rollout.servers.answer_checks import check_answers
from megatron_rl.rollout.servers.api import Answer, BadAnswer

#: The version of all answers here: an own engine need not give one.
_ANY = "any"


def own_engine(
    row: EngineEntry, make: Callable[[EngineParts], Any], parts: EngineParts
) -> OwnEngine:
    """Make a user's engine. A collective.

    Args:
        row: the engine's entry in the catalogue.
        make: makes the engine.
        parts: what the run gives to it.

    Raises:
        UserError: ``make`` raises on a rank, or the engine lacks a method. On all ranks.
    """
    who = f"the rollout engine {row.name!r}"

    def make_engine() -> None:
        with blame(f"{who}, made for a run,", "correct the engine"):
            engine.append(make(parts))
        for name in ENGINES.methods:
            if not callable(getattr(engine[0], name, None)):
                raise UserError(
                    f"{who} makes a {type(engine[0]).__name__} without {name}; expected "
                    f"{', '.join(ENGINES.methods)}; derive it from "
                    "megatron_rl.rollout.engine.WholeAnswers, or write it"
                )

    engine: list[Engine] = []
    collective_try(parts.groups.world, make_engine)
    return OwnEngine(who, engine[0], parts)


class OwnEngine:
    """`Engine` around a user's engine. An error or an impossible answer ends the run with one line,
    on all ranks.
    """

    def __init__(self, who: str, engine: Engine, parts: EngineParts) -> None:
        """who: names the engine at the beginning of an error."""
        self._who, self._engine, self._parts = who, engine, parts

    def generate(self, prompts: Sequence[Prompt], settings: SamplingSettings) -> list[RolloutGroup]:
        """See `Engine`. A collective."""
        return self._checked(lambda: self._engine.generate(prompts, settings), prompts, settings)

    def begin(
        self, prompts: Sequence[Prompt], settings: SamplingSettings
    ) -> Callable[[], list[RolloutGroup]]:
        """See `Engine`. A collective."""
        finish: list[Callable[[], list[RolloutGroup]]] = []
        self._together(lambda: finish.append(self._engine.begin(prompts, settings)))
        return lambda: self._checked(finish[0], prompts, settings)

    @property
    def version(self) -> int:
        """See `Engine`."""
        return self._engine.version

    def weights_changed(self) -> None:
        """See `Engine`. A collective."""
        self._together(self._engine.weights_changed)

    def metrics(self) -> dict[str, float]:
        """See `Engine`."""
        with self._blame():
            return self._engine.metrics()

    def close(self) -> None:
        """See `Engine`."""
        with self._blame():
            self._engine.close()

    def _blame(self) -> blame:
        return blame(self._who, "correct the engine")

    def _together(self, action: Callable[[], Any]) -> None:
        def blamed() -> None:
            with self._blame():
                action()

        collective_try(self._parts.groups.world, blamed)

    def _checked(
        self,
        answers: Callable[[], list[RolloutGroup]],
        prompts: Sequence[Prompt],
        settings: SamplingSettings,
    ) -> list[RolloutGroup]:
        groups: list[RolloutGroup] = []

        def take() -> None:
            with self._blame():
                groups.extend(answers())
            self._check(groups, prompts, settings)

        collective_try(self._parts.groups.world, take)
        return groups

    def _check(
        self,
        groups: Sequence[RolloutGroup],
        prompts: Sequence[Prompt],
        settings: SamplingSettings,
    ) -> None:
        """Raises UserError if a group is missing, or the policy cannot have sampled an answer."""
        given = [getattr(group, "prompt", None) for group in groups]
        if len(given) != len(prompts) or any(a is not b for a, b in zip(given, prompts)):
            raise UserError(
                f"{self._who} gives {len(given)} groups for {len(prompts)} prompts, or others than "
                "these; expected a RolloutGroup for each prompt, in their order; correct the engine"
            )
        model = self._parts.config.model
        for group in groups:
            room = model.max_sequence_length - len(group.prompt.tokens)
            longest = min(settings.max_new_tokens, room)
            try:
                check_answers(
                    [_as_answer(completion) for completion in group.completions],
                    group.prompt,
                    replace(settings, max_new_tokens=longest),
                    self._parts.stop_ids,
                    model.vocab_size,
                    [_ANY],
                )
            except BadAnswer as error:
                raise UserError(
                    f"{self._who} gives for problem {group.prompt.index} (from 0) {error}; correct "
                    "the engine"
                ) from error


def _as_answer(completion: Completion) -> Answer:
    """The completion in the form of a server's answer. BadAnswer: a field has a wrong type."""
    kinds = {"tokens": np.int64, "logprobs": np.float32}
    for name, kind in kinds.items():
        array = getattr(completion, name, None)
        if not isinstance(array, np.ndarray) or array.dtype != kind or array.ndim != 1:
            found = getattr(array, "dtype", type(array).__name__)
            raise BadAnswer(f"{name} of {found}; expected one dimension of {np.dtype(kind)}")
    routes = completion.routed_experts
    if routes is not None and not isinstance(routes, RoutedExperts):
        raise BadAnswer(f"routed_experts of {type(routes).__name__}; expected RoutedExperts")
    kept = completion.kept
    if kept is not None and not isinstance(kept, KeptTokens):
        raise BadAnswer(f"kept of {type(kept).__name__}; expected KeptTokens")
    return Answer(
        tokens=completion.tokens,
        logprobs=completion.logprobs,
        stopped=completion.finished,
        versions=(_ANY,),
        routed_experts=None if routes is None else routes.ids,
        kept=kept,
    )
