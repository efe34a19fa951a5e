"""Requests for answers: what a server is asked for a prompt, and how its response is checked."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Callable, Collection

import numpy as np

from megatron_rl.config.layout import moe_layers
from megatron_rl.config.schema import ModelConfig
from megatron_rl.records import KeptTokens, Prompt
from megatron_rl.rollout.engine import SamplingSettings
from megatron_rl.rollout.servers.answer_checks import ExpertShape, check_answers
from megatron_rl.rollout.servers.api import CONTROL_BYTES, Answer, ServerApi
from megatron_rl.rollout.servers.pool import Request

#: Most bytes of JSON for a token of an answer. vLLM sends 150 (id, rank and likeliest token too),
#: SGLang 50.
_TOKEN_BYTES = 512
#: The seed of a prompt's first answer is below it; the seeds of its other answers follow.
SEEDS = 2**31 - 2**11


class AnswerRequests:
    """Makes a run's requests for answers."""

    def __init__(
        self,
        api: ServerApi,
        model: ModelConfig,
        stop_ids: Collection[int],
        newest: Callable[[], int],
    ) -> None:
        """
        Args:
            api: of the kind of server.
            model: the policy's architecture.
            stop_ids: the tokens that end an answer.
            newest: gives the version of the trainer's weights when a response is read.
        """
        self._api, self._model = api, model
        self._stop_ids, self._newest = tuple(stop_ids), newest
        moe = tuple(layer for layer, is_moe in enumerate(moe_layers(model)) if is_moe)
        self._experts = ExpertShape(model.num_layers, moe, model.moe_top_k, model.num_experts)

    def of_prompt(
        self,
        prompt: Prompt,
        settings: SamplingSettings,
        version: int,
        *,
        partial: bool = False,
        seed: int | None = None,
    ) -> Request[list[Answer]]:
        """Ask for a prompt's answers.

        Args:
            prompt: the prompt.
            settings: how many answers, how long, and how they are drawn.
            version: of the weights that are to sample them.
            partial: partial rollouts are allowed: an update may abort the answers, and later
                weights may sample the rest.
            seed: of the first answer; None: it follows from the run's seed and the prompt.
        """
        settings = replace(settings, max_new_tokens=self.longest(prompt, settings))

        def read(payload: Any) -> list[Answer]:
            answers = self._api.read_answers(payload)
            last = self._newest() if partial else version
            versions = [str(number) for number in range(version, last + 1)]
            size = self._model.vocab_size
            check_answers(answers, prompt, settings, self._stop_ids, size, versions, partial)
            return [self._with_experts(answer, prompt, settings) for answer in answers]

        if seed is None:
            first = prompt.first_sample(settings.samples)
            seed = answer_seed(settings.seed, prompt.index, first)
        call = self._api.generate_call(prompt, settings, seed, self._stop_ids)
        return Request(call, read, most_bytes(prompt, settings, self._experts))

    def rest_of(
        self, answer: Answer, number: int, prompt: Prompt, settings: SamplingSettings, version: int
    ) -> Request[list[Answer]]:
        """Ask for the rest of an aborted answer, with random numbers of its own.

        Args:
            answer: the tokens so far.
            number: of the answer among the prompt's, from 0.
            prompt: the prompt.
            settings: those of the whole answer.
            version: of the oldest weights that may sample the rest.
        """
        made = len(answer.tokens)
        longer = replace(prompt, tokens=np.concatenate([prompt.tokens, answer.tokens]))
        left = replace(settings, samples=1, max_new_tokens=settings.max_new_tokens - made)
        number += prompt.first_sample(settings.samples)
        seed = answer_seed((settings.seed + (made << 44)) % 2**64, prompt.index, number)
        return self.of_prompt(longer, left, version, partial=True, seed=seed)

    def has_rest(self, answer: Answer, prompt: Prompt, settings: SamplingSettings) -> bool:
        """Whether the answer was aborted before its last token."""
        tokens = answer.tokens
        full = len(tokens) == self.longest(prompt, settings)
        ended = len(tokens) > 0 and int(tokens[-1]) in self._stop_ids
        return answer.aborted and not full and not ended

    def longest(self, prompt: Prompt, settings: SamplingSettings) -> int:
        """Most tokens of an answer to the prompt."""
        room = self._model.max_sequence_length - len(prompt.tokens)
        return min(settings.max_new_tokens, room)

    def _with_experts(self, answer: Answer, prompt: Prompt, settings: SamplingSettings) -> Answer:
        """The answer with the experts of the MoE layers and the kept tokens, or without them if it
        needs none.
        """
        routes, count = answer.routed_experts, len(answer.tokens)
        if not (settings.routes and count):
            routes = None
        if routes is not None:  # `check_answers` has refused an answer that lacks them
            routes = self._experts.of_moe_layers(routes, len(prompt.tokens) + count - 1)
        kept = None
        if settings.keeps:
            kept = answer.kept if count else KeptTokens.empty(0)
        return replace(answer, routed_experts=routes, kept=kept)


def most_bytes(prompt: Prompt, settings: SamplingSettings, experts: ExpertShape) -> int:
    """Largest response to a request for a prompt's answers, bytes."""
    length = len(prompt.tokens) + settings.max_new_tokens
    answer = _TOKEN_BYTES * settings.max_new_tokens
    if settings.routes:
        answer += 6 * length * experts.layers * experts.top_k  # 4 bytes each, in base64
    if settings.keeps:  # ties may keep more than top_k; 12 bytes: ten digits, comma and space
        answer += 24 * settings.max_new_tokens * settings.top_k
    return CONTROL_BYTES + settings.samples * answer


def answer_seed(seed: int, index: int, number: int = 0) -> int:
    """Seed of an answer, in [0, 2^31), from the run's seed, the prompt's index and the answer's
    number.

    The answers of one prompt have consecutive seeds. So they never share a seed, however often a
    step draws the prompt. Two prompts get different seeds by chance.
    """
    bits = np.random.Philox(key=np.array([seed, index], dtype=np.uint64))
    first = int(np.random.Generator(bits).integers(SEEDS))
    return (first + number) % SEEDS
