"""The engine that has inference servers sample the answers, over HTTP."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any, Callable, Sequence

from megatron_rl.config.layout import moe_layers, stage_layers
from megatron_rl.data.packed_routes import id_type
from megatron_rl.errors import UserError
from megatron_rl.parallel.collective_try import collective_try
from megatron_rl.parallel.collectives import gather_objects, scatter_objects
from megatron_rl.parallel.waiting import wait_together
from megatron_rl.records import Completion, Prompt, RolloutGroup, RoutedExperts
from megatron_rl.rollout.engine import EngineParts, SamplingSettings
from megatron_rl.rollout.servers.answer_requests import AnswerRequests
from megatron_rl.rollout.servers.api import Answer, BroadcastApi, ServerApi
from megatron_rl.rollout.servers.own_servers import Command
from megatron_rl.rollout.servers.sync import WeightSync


class ServerEngine:
    """`Engine` on inference servers: servers that run already, or servers that it starts on rank
    0's machine.

    Ranks with the same prompts share one rank's requests. Before the first answers after an update
    the servers get the new weights. A server is used only if its log-probabilities then agree with
    the trainer's.
    """

    def __init__(
        self,
        parts: EngineParts,
        api: ServerApi,
        command: Command | None = None,
        broadcast: BroadcastApi | None = None,
    ) -> None:
        """
        Args:
            parts: what the run gives. Of the config it reads rollout, model and run_dir.
            api: of the kind of server.
            command: of a server, for ``rollout.servers.start``; None: none can be started.
            broadcast: of a kind of server that takes weights from a process group, for
                ``rollout.servers.sync: broadcast``; None: this kind does not.

        Raises:
            ValueError: the configuration needs a command or a broadcast, and it is None.
        """
        config = parts.config
        self._config, self._groups = config, parts.groups
        self._stop_ids, self._decode = tuple(parts.stop_ids), parts.decode
        self._progress, self._stop = parts.progress, parts.stop
        self._version = 0
        self._requests = AnswerRequests(api, config.model, parts.stop_ids, lambda: self._version)
        self.sync = WeightSync(parts, api, broadcast, command, self._requests)
        self._layers = tuple(n for n, is_moe in enumerate(moe_layers(config.model), 1) if is_moe)
        self._staleness = config.rollout.lag  #: steps that answers may be older than the update
        #: One thread for each batch of prompts under way: those of later steps, and an evaluation.
        self._threads = ThreadPoolExecutor(self._staleness + 1, "rollout servers")
        self._batches = 0  #: batches begun; an earlier batch is asked for first
        self._under_way: list[Future[Any]] = []  #: batches begun here and not answered yet

    @property
    def version(self) -> int:
        """Version of the trainer's weights: how often they have changed."""
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
        """Ask in the background, with the weights of this moment. A collective.

        Weights that change later are sent when all answers are there. With a staleness above 1 they
        are sent at once: unfinished answers are aborted, and continued with the new weights.

        Returns:
            A collective that waits for the answers and returns them, as `generate` does. It raises
            `Stopped` on all ranks where one rank hears that the run is to stop.
        """
        groups = self._groups
        collective_try(groups.world, lambda: self._check(prompts))
        if self.sync.sent != self._version:
            if self._staleness <= 1:
                # No answer may begin with some weights and end with others.
                wait_together(self._under_way, groups.world, to_the_end=True, stop=self._stop)
            self.sync.send(self._version)
        asking = None
        if groups.model.rank() == 0 and groups.context.rank() == 0:
            self._batches += 1
            batch = (prompts, settings, self._version, self._batches)
            asking = self._threads.submit(self._ask, *batch)
            self._under_way = [one for one in self._under_way if not one.done()] + [asking]

        def finish() -> list[RolloutGroup]:
            found: list[list[RolloutGroup]] = []
            waited = [asking] if asking else []
            wait_together(waited, groups.world, to_the_end=True, stop=self._stop)
            collective_try(groups.world, lambda: found.append(asking.result()) if asking else None)
            return self._shared(found)

        return finish

    def metrics(self) -> dict[str, float]:
        """See `Engine`. A rank that asks nothing and starts nothing has zeros."""
        return self.sync.metrics()

    def close(self) -> None:
        """See `Engine`. Break off all requests, and end the servers that it started."""
        self.sync.stop_asking()
        self._threads.shutdown(wait=False, cancel_futures=True)
        self.sync.close()

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

    def _ask(
        self, prompts: Sequence[Prompt], settings: SamplingSettings, version: int, batch: int
    ) -> list[RolloutGroup]:
        """The groups of a batch of prompts, in a thread of its own."""
        partial = self._staleness > 1
        requests = [
            self._requests.of_prompt(prompt, settings, version, partial=partial)
            for prompt in prompts
        ]
        answers = self.sync.pool.ask(
            requests, lambda done: self._progress(done, len(requests)), batch
        )
        self._continue(prompts, answers, settings, version, batch)
        return [
            RolloutGroup(prompt, tuple(self._completion(answer, version) for answer in of_prompt))
            for prompt, of_prompt in zip(prompts, answers, strict=True)
        ]

    def _continue(
        self,
        prompts: Sequence[Prompt],
        answers: list[list[Answer]],
        settings: SamplingSettings,
        version: int,
        batch: int,
    ) -> None:
        """Ask for the rest of aborted answers, again and again, until every answer has ended."""
        while True:
            places = [
                (p, number)
                for p, of_prompt in enumerate(answers)
                for number, answer in enumerate(of_prompt)
                if self._requests.has_rest(answer, prompts[p], settings)
            ]
            if not places:
                return
            requests = [
                self._requests.rest_of(answers[p][number], number, prompts[p], settings, version)
                for p, number in places
            ]
            rests = self.sync.pool.ask(requests, batch=batch)
            for (p, number), (rest,) in zip(places, rests, strict=True):
                answers[p][number] = answers[p][number].continued(rest, len(prompts[p].tokens))

    def _completion(self, answer: Answer, version: int) -> Completion:
        routes = None
        if answer.routed_experts is not None:
            ids = answer.routed_experts.astype(id_type(self._config.model.num_experts))
            routes = RoutedExperts(ids, self._layers)
        # A server calls an answer too long even if its last allowed token is a stop token.
        finished = int(answer.tokens[-1]) in self._stop_ids
        return Completion(
            tokens=answer.tokens,
            logprobs=answer.logprobs,
            finished=finished,
            text=self._decode(answer.tokens[: len(answer.tokens) - finished].tolist()),
            routed_experts=routes,
            version=int(answer.versions[0]) if answer.versions else version,
            last_version=int(answer.versions[-1]) if answer.versions else version,
            kept=answer.kept,
        )

    def _shared(self, found: list[list[RolloutGroup]]) -> list[RolloutGroup]:
        """The groups that one rank has asked for, on all ranks with the same prompts, each with the
        experts of its pipeline stage.

        Args:
            found: the groups, on the rank that asked; empty on the others.
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
