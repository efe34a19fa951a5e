"""Checks of sampled answers: could the policy have sampled them, with the weights asked for?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Collection, Sequence

import numpy as np

from megatron_rl.records import Prompt
from megatron_rl.rollout.engine import SamplingSettings
from megatron_rl.rollout.servers.api import Answer, BadAnswer

#: No sampled token has a lower log-probability. The least float32 above 0 is exp(-103.3), so a
#: sampler gives anything less likely the probability 0, and neither Gumbel noise nor an inverse
#: distribution draws it. vLLM sends -9999 where it has no log-probability.
LEAST_LOGPROB = -104.0


@dataclass(frozen=True)
class ExpertShape:
    """The shape of the experts that a model's answers carry."""

    layers: int  #: layers of the model
    moe: tuple[int, ...]  #: numbers of the MoE layers, from 0
    top_k: int  #: experts of a token
    count: int  #: experts of a layer

    def of_moe_layers(self, ids: np.ndarray, tokens: int) -> np.ndarray:
        """Experts [tokens, L, K] of the MoE layers. A server reports those layers, or all layers.

        Raises:
            BadAnswer: the array has another shape or type, or an id is wrong or twice in a row.
        """
        expected = f"{tokens} tokens, {self.layers} or {len(self.moe)} layers, {self.top_k} experts"
        if ids.ndim != 3 or ids.dtype.kind not in "iu":
            raise BadAnswer(f"experts of shape {ids.shape}, {ids.dtype}; expected {expected}")
        if len(ids) != tokens or ids.shape[2] != self.top_k:
            raise BadAnswer(f"experts of shape {ids.shape}; expected {expected}")
        if ids.shape[1] == self.layers:
            ids = ids[:, list(self.moe)]
        if ids.shape[1] != len(self.moe):
            raise BadAnswer(f"experts of {ids.shape[1]} layers; expected {expected}")
        if ids.size and not 0 <= int(ids.min()) <= int(ids.max()) < self.count:
            raise BadAnswer(
                f"experts from {ids.min()} to {ids.max()}; expected ids below {self.count}"
            )
        if (np.diff(np.sort(ids, axis=-1), axis=-1) == 0).any():
            raise BadAnswer("an expert twice for one token; expected each once")
        return ids


def check_answers(
    answers: Sequence[Answer],
    prompt: Prompt,
    settings: SamplingSettings,
    stop_ids: Collection[int],
    vocab_size: int,
    versions: Sequence[str],
    may_be_aborted: bool = False,
) -> None:
    """Refuse answers that the policy could not have sampled.

    Args:
        answers: to one prompt.
        prompt: the prompt.
        settings: ``samples`` answers of at most ``max_new_tokens`` tokens are expected.
        stop_ids: an answer ends with the first of them, or is as long as allowed.
        vocab_size: token ids are below it.
        versions: of the weights that may have sampled a token, the oldest first.
        may_be_aborted: whether an answer may be aborted, and then be of any length.

    Raises:
        BadAnswer: the number or length of the answers, a token, a log-probability, a version, the
            experts or the kept tokens are not what was asked for.
    """
    if len(answers) != settings.samples:
        raise BadAnswer(f"{len(answers)} answers; expected {settings.samples}")
    for answer in answers:
        count = len(answer.tokens)
        if answer.aborted and not may_be_aborted:
            raise BadAnswer("an answer that was broken off; expected a whole one")
        if not (0 if answer.aborted else 1) <= count <= settings.max_new_tokens:
            raise BadAnswer(f"an answer of {count} tokens; expected 1 to {settings.max_new_tokens}")
        outside = answer.tokens[(answer.tokens < 0) | (answer.tokens >= vocab_size)]
        if len(outside):
            raise BadAnswer(f"token {int(outside[0])}; expected ids below {vocab_size}")
        _check_logprobs(answer)
        _check_end(answer, settings.max_new_tokens, sorted(stop_ids))
        _check_versions(answer, list(versions))
        if settings.keeps and count:
            _check_kept(answer, vocab_size)
        routes, tokens = answer.routed_experts, len(prompt.tokens) + count - 1
        if settings.routes and count and (routes is None or len(routes) != tokens):
            raise BadAnswer(
                "no experts of its tokens, which algorithm.routing_replay r3 needs; expected an "
                "engine that returns them (vLLM on a GPU, with enable_return_routed_experts)"
            )


def _check_logprobs(answer: Answer) -> None:
    """Each token has a log-probability with which a sampler could have drawn it."""
    count = len(answer.tokens)
    if len(answer.logprobs) != count:
        raise BadAnswer(f"{len(answer.logprobs)} log-probabilities for {count} tokens")
    inside = (answer.logprobs >= LEAST_LOGPROB) & (answer.logprobs <= 1e-3)  # False for NaN
    if not inside.all():
        raise BadAnswer(
            f"log-probability {answer.logprobs[~inside][0]}; expected finite, at most 0, and at "
            f"least {LEAST_LOGPROB:g}, below which float32 has no probability"
        )


def _check_kept(answer: Answer, vocab_size: int) -> None:
    """Each token is in the set of tokens that top-p and top-k kept for it."""
    kept, count = answer.kept, len(answer.tokens)
    if kept is None or len(kept.sizes) != count:
        found = "no" if kept is None else len(kept.sizes)
        raise BadAnswer(
            f"{found} sets of kept tokens for {count} tokens, which rollout.keep_sampling_mask "
            "needs; expected an engine that returns them (vLLM with --return-sampling-mask)"
        )
    if kept.ids.size and not 0 <= int(kept.ids.min()) <= int(kept.ids.max()) < vocab_size:
        raise BadAnswer(
            f"kept tokens from {kept.ids.min()} to {kept.ids.max()}; expected ids below "
            f"{vocab_size}"
        )
    missing = kept.missing(answer.tokens)
    if missing.any():
        raise BadAnswer(
            f"token {answer.tokens[missing][0]} outside of the kept tokens that it was drawn from"
        )


def _check_end(answer: Answer, longest: int, stop_ids: Sequence[int]) -> None:
    """An answer ends with the first stop token, or at the length limit."""
    named = " or ".join(map(str, stop_ids)) or "none"
    places = np.flatnonzero(np.isin(answer.tokens, stop_ids))
    if len(places) and places[0] < len(answer.tokens) - 1:
        raise BadAnswer(
            f"an answer that runs on behind the stop token {answer.tokens[places[0]]}; expected it "
            f"to end at the first of {named}"
        )
    if answer.stopped and not len(places):
        raise BadAnswer(
            f"an answer that stops at the token {answer.tokens[-1:].tolist()}, which is none of "
            f"the stop tokens {named}; expected one server and run agree in; name it in "
            "rollout.stop_token_ids if it is to end answers"
        )
    if not (answer.stopped or answer.aborted or len(answer.tokens) == longest):
        without = "and calls it the longest" if len(places) else "without a stop token"
        raise BadAnswer(
            f"an answer that ends after {len(answer.tokens)} tokens {without}; expected {longest}, "
            f"or one of {named}"
        )


def _check_versions(answer: Answer, versions: Sequence[str]) -> None:
    """The expected weights sampled every token, and no older weights after newer ones."""
    expected = " or ".join(versions)
    if not answer.versions and len(answer.tokens):
        raise BadAnswer(f"an answer that names no version of its weights; expected {expected}")
    if any(found not in versions for found in answer.versions):
        raise BadAnswer(f"weights of version {' '.join(answer.versions)}; expected {expected}")
    places = [versions.index(found) for found in answer.versions]
    if places != sorted(places):
        raise BadAnswer(f"weights of versions {' '.join(answer.versions)}, in this order")
