"""The engine that asks inference servers: weights out, answers back over HTTP."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any, Callable, Sequence

import numpy as np

from megatron_rl.config.layout import moe_layers, stage_layers
from megatron_rl.data.packing import id_type
from megatron_rl.errors import UserError
from megatron_rl.parallel.collective_try import collective_try
from megatron_rl.parallel.collectives import gather_objects, scatter_objects
from megatron_rl.parallel.waiting import wait_together
from megatron_rl.records import Completion, Prompt, RolloutGroup, RoutedExperts
from megatron_rl.rollout.engine import EngineParts, SamplingSettings
from megatron_rl.rollout.servers.api import (
    Answer,
    ExpertShape,
    ServerApi,
    answer_seed,
    check_answers,
    most_bytes,
)
from megatron_rl.rollout.servers.pool import Question
from megatron_rl.rollout.servers.sync import Command, WeightSync


class ServerEngine:
    """`Engine` on servers that run already, or on servers of its own on rank 0's machine.

    One rank of those with the same prompts asks for all of them. The weights are sent before the
    first answers after they have changed; answers count only from servers whose log-probabilities
    then agree with the trainer's.
    """

    def __init__(self, parts: EngineParts, api: ServerApi, command: Command | None = None) -> None:
        """
        Args:
            parts: what the run gives; of the config, rollout, model and run_dir are looked at.
            api: of the kind of server.
            command: starts a server, where the configuration asks for servers of its own.
        """
        config = parts.config
        self._config, self._api, self._groups = config, api, parts.groups
        self._stop_ids, self._decode = tuple(parts.stop_ids), parts.decode
        self._progress, self._stop = parts.progress, parts.stop
        self.sync = WeightSync(
            config,
            api,
            parts.chunks,
            parts.groups,
            question=self._question,
            say=parts.say,
            meeting=parts.meeting,
            command=command,
            stop=parts.stop,
        )
        self._version = 0
        model = config.model
        moe = tuple(i for i, is_moe in enumerate(moe_layers(model)) if is_moe)
        self._experts = ExpertShape(model.num_layers, moe, model.moe_top_k, model.num_experts)
        self._layers = tuple(layer + 1 for layer in moe)
        self._lag = config.rollout.lag
        #: The steps ahead, and an evaluation.
        self._threads = ThreadPoolExecutor(self._lag + 1, "rollout servers")
        self._begun = 0  #: how often: what was asked for first is answered first
        self._asking: list[Future[Any]] = []  #: answers that are being asked for in the background

    @property
    def version(self) -> int:
        """Of the trainer's weights: how often they have changed."""
        return self._version

    def weights_changed(self) -> None:
        """See `Engine`."""
        self._version += 1

    def generate(self, prompts: Sequence[Prompt], settings: SamplingSettings) -> list[RolloutGroup]:
        """See `Engine`. A collective.

        Raises:
            UserError: a prompt leaves no room for an answer, or holds a token the model does not
                know. RunFailed: no server answers, or none has the right weights.
        """
        return self.begin(prompts, settings)()

    def begin(
        self, prompts: Sequence[Prompt], settings: SamplingSettings
    ) -> Callable[[], list[RolloutGroup]]:
        """Ask in the background; the answers are by the weights of this moment. A collective.

        Weights that change meanwhile are sent when all answers are there; with a lag above 1 they
        are sent at once, and answers that are being sampled go on with them.

        Returns:
            Waits for the answers and gives them, as `generate` does. A collective. Raises `Stopped`
            on all ranks where one that waits hears that the run is to stop.
        """
        groups = self._groups
        collective_try(groups.world, lambda: self._check(prompts))
        if self.sync.sent != self._version:
            if self._lag <= 1:
                # No answer is to begin with some weights and end with others.
                wait_together(self._asking, groups.world, to_the_end=True, stop=self._stop)
            self.sync.send(self._version)
        asking = None
        if groups.model.rank() == 0 and groups.context.rank() == 0:
            self._begun += 1
            asking = self._threads.submit(self._ask, prompts, settings, self._version, self._begun)
            self._asking = [one for one in self._asking if not one.done()] + [asking]

        def finish() -> list[RolloutGroup]:
            found: list[list[RolloutGroup]] = []
            waited = [asking] if asking else []
            wait_together(waited, groups.world, to_the_end=True, stop=self._stop)
            collective_try(groups.world, lambda: found.append(asking.result()) if asking else None)
            return self._mine(found)

        return finish

    def metrics(self) -> dict[str, float]:
        """Since the last call, of this rank; 0 where it has not asked or started anything."""
        return self.sync.metrics()

    def close(self) -> None:
        """Stop the servers this engine has started, and asking."""
        self.sync.stop_asking()
        self._threads.shutdown(wait=False, cancel_futures=True)
        self.sync.close()

    # -- asking ----------------------------------------------------------------------------------

    def _check(self, prompts: Sequence[Prompt]) -> None:
        model = self._config.model
        for prompt in prompts:
            if not 0 < len(prompt.tokens) < model.max_sequence_length:
                raise UserError(
                    f"problem {prompt.index} (from 0) has {len(prompt.tokens)} tokens; expected 1 "
                    f"to {model.max_sequence_length - 1}; shorten it or raise "
                    "model.max_sequence_length"
                )
            if prompt.tokens.max() >= model.vocab_size:
                raise UserError(
                    f"problem {prompt.index} (from 0) holds the token {prompt.tokens.max()}; "
                    f"expected ids below model.vocab_size {model.vocab_size}; use the model's "
                    "tokenizer"
                )

    def _question(
        self,
        prompt: Prompt,
        settings: SamplingSettings,
        version: int,
        carried: bool = False,
        seed: int | None = None,
    ) -> Question[list[Answer]]:
        """carried: the answers may be broken off, and are by this version or a later one."""
        model = self._config.model
        settings = replace(settings, max_new_tokens=self._longest(prompt, settings))

        def read(payload: Any) -> list[Answer]:
            answers = self._api.answers(payload)
            last = self._version if carried else version
            versions = [str(number) for number in range(version, last + 1)]
            size = model.vocab_size
            check_answers(answers, prompt, settings, self._stop_ids, size, versions, carried)
            return [self._with_experts(answer, prompt, settings) for answer in answers]

        if seed is None:
            first = prompt.first_sample(settings.samples)
            seed = answer_seed(settings.seed, prompt.index, first)
        call = self._api.generation(prompt, settings, seed, self._stop_ids)
        return Question(call, read, most_bytes(prompt, settings, self._experts))

    def _with_experts(self, answer: Answer, prompt: Prompt, settings: SamplingSettings) -> Answer:
        """With those of the MoE layers, where they are asked for and there are tokens."""
        routes, count = answer.routed_experts, len(answer.tokens)
        if not (settings.routes and count):
            routes = None
        if routes is not None:  # `check_answers` has missed none
            routes = self._experts.of_moe_layers(routes, len(prompt.tokens) + count - 1)
        return replace(answer, routed_experts=routes)

    def _ask(
        self, prompts: Sequence[Prompt], settings: SamplingSettings, version: int, turn: int
    ) -> list[RolloutGroup]:
        carried = self._lag > 1
        questions = [self._question(prompt, settings, version, carried) for prompt in prompts]
        answers = self.sync.asked.ask(
            questions, lambda done: self._progress(done, len(questions)), turn
        )
        self._go_on(prompts, answers, settings, version, turn)
        return [
            RolloutGroup(prompt, tuple(self._completion(answer, version) for answer in of_prompt))
            for prompt, of_prompt in zip(prompts, answers, strict=True)
        ]

    def _go_on(
        self,
        prompts: Sequence[Prompt],
        answers: list[list[Answer]],
        settings: SamplingSettings,
        version: int,
        turn: int,
    ) -> None:
        """Ask for the rest of answers that were broken off, until none is."""
        while True:
            broken = [
                (p, number)
                for p, of_prompt in enumerate(answers)
                for number, answer in enumerate(of_prompt)
                if answer.aborted and not self._has_ended(answer, prompts[p], settings)
            ]
            if not broken:
                return
            questions = [
                self._rest_of(prompts[p], answers[p][number], number, settings, version)
                for p, number in broken
            ]
            for (p, number), (rest,) in zip(
                broken, self.sync.asked.ask(questions, turn=turn), strict=True
            ):
                answer = answers[p][number]
                answers[p][number] = answer.continued(rest, len(prompts[p].tokens))

    def _longest(self, prompt: Prompt, settings: SamplingSettings) -> int:
        """Most tokens of an answer to the prompt."""
        room = self._config.model.max_sequence_length - len(prompt.tokens)
        return min(settings.max_new_tokens, room)

    def _has_ended(self, answer: Answer, prompt: Prompt, settings: SamplingSettings) -> bool:
        """Whether nothing can follow, although it was broken off."""
        tokens = answer.tokens
        full = len(tokens) == self._longest(prompt, settings)
        return full or (len(tokens) > 0 and int(tokens[-1]) in self._stop_ids)

    def _rest_of(
        self, prompt: Prompt, answer: Answer, number: int, settings: SamplingSettings, version: int
    ) -> Question[list[Answer]]:
        """Ask for what comes behind the tokens there are; with other random numbers than those."""
        made = len(answer.tokens)
        longer = replace(prompt, tokens=np.concatenate([prompt.tokens, answer.tokens]))
        left = replace(settings, samples=1, max_new_tokens=settings.max_new_tokens - made)
        number += prompt.first_sample(settings.samples)
        seed = answer_seed((settings.seed + (made << 44)) % 2**64, prompt.index, number)
        return self._question(longer, left, version, True, seed)

    def _completion(self, answer: Answer, version: int) -> Completion:
        routes = None
        if answer.routed_experts is not None:
            ids = answer.routed_experts.astype(id_type(self._config.model.num_experts))
            routes = RoutedExperts(ids, self._layers)
        # Not as the server names it: the last token that is allowed may be a stop token.
        finished = int(answer.tokens[-1]) in self._stop_ids
        return Completion(
            tokens=answer.tokens,
            logprobs=answer.logprobs,
            finished=finished,
            text=self._decode(answer.tokens[: len(answer.tokens) - finished].tolist()),
            routed_experts=routes,
            version=int(answer.versions[0]) if answer.versions else version,
            last_version=int(answer.versions[-1]) if answer.versions else version,
        )

    def _mine(self, found: list[list[RolloutGroup]]) -> list[RolloutGroup]:
        """The answers of the rank that has asked for the same prompts, with the experts of this
        pipeline stage; ``found`` is empty here if that is another rank.
        """
        found = [
            answers
            for of_rank in gather_objects(found, self._groups.context)
            for answers in of_rank
        ]
        model, parallel, stage = self._groups.model, self._config.parallel, self._groups.pipeline
        stages = stage_layers(self._config.model.num_layers, parallel)
        needed = gather_objects([layer + 1 for layer in stages[stage.rank()]], model)
        parts = (
            [[_with_layers(g, layers) for g in found[0]] for layers in needed] if found else None
        )
        return scatter_objects(parts, model)


def _with_layers(group: RolloutGroup, needed: Sequence[int]) -> RolloutGroup:
    """The group with the sampler's experts of these layers alone."""
    return replace(group, completions=tuple(_of_layers(a, needed) for a in group.completions))


def _of_layers(answer: Completion, needed: Sequence[int]) -> Completion:
    routes = answer.routed_experts
    if routes is None:
        return answer
    columns = [i for i, layer in enumerate(routes.layers) if layer in needed]
    layers = tuple(routes.layers[i] for i in columns)
    return replace(answer, routed_experts=RoutedExperts(routes.ids[:, columns], layers))
