"""What an inference server is asked and what it answers, whatever its kind."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Collection, Protocol, Sequence, TypeVar

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from megatron_rl.records import Prompt
from megatron_rl.rollout.engine import SamplingSettings

#: Largest response of a server where no answers are asked for, bytes.
CONTROL_BYTES = 1 << 20
#: Bytes of JSON that an answer's token takes at most: vLLM sends 150, with its id, its rank and the
#: likeliest token; SGLang 50.
_TOKEN_BYTES = 512
#: Log-probability that no sampled token has: the least float32 above 0 is exp(-103.3), so what is
#: less likely has the probability 0 in a sampler, and neither Gumbel noise nor an inverse
#: distribution draws it. vLLM says -9999 where it has none.
LEAST_LOGPROB = -104.0


class BadAnswer(Exception):
    """A server has not answered, or not the question, or not by the weights that were asked for."""


class NoAnswer(BadAnswer):
    """Nothing that a server has sent by the deadline is an HTTP response."""


class Sent(BaseModel):
    """Base of what servers send: of exactly these types; what else they send is not looked at."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)


SentT = TypeVar("SentT", bound=Sent)


def understood(kind: type[SentT], payload: Any, route: str) -> SentT:
    """The response of a route. Raises `BadAnswer`."""
    try:
        return kind.model_validate(payload)
    except ValidationError as error:
        (first, *_) = error.errors(include_url=False, include_input=False, include_context=False)
        place = ".".join(map(str, first["loc"])) or "it"
        raise BadAnswer(f"not a response of {route} ({place}: {first['msg']})") from None


@dataclass(frozen=True)
class Call:
    """One request."""

    path: str
    body: dict[str, Any] | None  #: of a POST; None: a GET


@dataclass(frozen=True)
class Answer:
    """One sampled answer, as the server sent it."""

    tokens: np.ndarray  #: int64 [N]
    logprobs: np.ndarray  #: float32 [N]
    stopped: bool  #: it ended by itself, not at the length limit
    versions: tuple[str, ...]  #: of the weights that made its tokens, in order; () where not said
    routed_experts: np.ndarray | None = None  #: integers [P + N - 1, L, K], of every MoE layer
    aborted: bool = False  #: it was broken off, for new weights; there is more to come

    def continued(self, rest: Answer, prompt_length: int) -> Answer:
        """This answer, which was broken off, and what the server went on with."""
        routes = rest.routed_experts
        if routes is not None and self.routed_experts is not None and len(self.tokens):
            # of its own tokens, the experts of the weights that drew the tokens behind them
            mine = prompt_length + len(self.tokens) - 1
            routes = np.concatenate([self.routed_experts[:mine], routes[mine:]])
        return Answer(
            np.concatenate([self.tokens, rest.tokens]),
            np.concatenate([self.logprobs, rest.logprobs]),
            rest.stopped,
            self.versions + rest.versions,
            routes,
            rest.aborted,
        )


class ServerApi(Protocol):
    """The requests of one kind of server."""

    def generation(
        self, prompt: Prompt, settings: SamplingSettings, seed: int, stop_ids: Sequence[int]
    ) -> Call:
        """Ask for ``settings.samples`` answers to a prompt; they end with the first token of
        ``stop_ids``.
        """

    def answers(self, payload: Any) -> list[Answer]:
        """The answers of a response. Raises `BadAnswer` for anything else."""

    def loading(self, directory: str, version: str) -> Sequence[Call]:
        """Make the server answer with the weights of a directory that it can read."""

    def interrupting(self) -> Sequence[Call]:
        """Break all answers off: what there is of them is sent, and no other begun before
        `resuming`.
        """

    def resuming(self) -> Sequence[Call]:
        """Answer again."""


@dataclass(frozen=True)
class ExpertShape:
    """The experts of a model, as its answers carry them."""

    layers: int  #: of the model
    moe: tuple[int, ...]  #: those with experts, from 0
    top_k: int  #: experts of a token
    count: int  #: experts of a layer

    def of_moe_layers(self, ids: np.ndarray, tokens: int) -> np.ndarray:
        """[tokens, L, K] of the MoE layers, from what a server reports: those or all layers.

        Raises:
            BadAnswer: it is anything else than experts of these layers, each once.
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


def most_bytes(prompt: Prompt, settings: SamplingSettings, experts: ExpertShape) -> int:
    """Largest response to a question, bytes."""
    length = len(prompt.tokens) + settings.max_new_tokens
    answer = _TOKEN_BYTES * settings.max_new_tokens
    if settings.routes:
        answer += 6 * length * experts.layers * experts.top_k  # 4 bytes each, in base64
    return CONTROL_BYTES + settings.samples * answer


def logprob_array(values: Sequence[float]) -> np.ndarray:
    """float32 [N]; what is too large for it is infinite, which `check_answers` refuses."""
    with np.errstate(over="ignore"):
        return np.array(values, dtype=np.float64).astype(np.float32)


#: Seeds of answers are below it; a question's other samples take those that follow.
SEEDS = 2**31 - 2**11


def answer_seed(seed: int, index: int, number: int = 0) -> int:
    """Seed of a prompt's answer, in [0, 2^31): of the run's seed, the prompt's index and the
    answer's number.

    The answers of a prompt have seeds one behind the other; prompts are kept apart by chance. So
    those of one prompt never share a seed, however often a step draws it.
    """
    bits = np.random.Philox(key=np.array([seed, index], dtype=np.uint64))
    first = int(np.random.Generator(bits).integers(SEEDS))
    return (first + number) % SEEDS


def check_answers(
    answers: Sequence[Answer],
    prompt: Prompt,
    settings: SamplingSettings,
    stop_ids: Collection[int],
    vocab_size: int,
    versions: Sequence[str],
    may_be_aborted: bool = False,
) -> None:
    """Refuse what could not have been sampled from the policy.

    An answer ends with the first token of ``stop_ids``, or has ``settings.max_new_tokens`` tokens.
    Its versions are among ``versions``, and in their order.

    Raises:
        BadAnswer: the number or length of answers, a token, a log-probability, the weights'
            version or the experts are not what was asked for.
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
        routes, tokens = answer.routed_experts, len(prompt.tokens) + count - 1
        if settings.routes and count and (routes is None or len(routes) != tokens):
            raise BadAnswer(
                "no experts of its tokens, which algorithm.routing_replay r3 needs; expected an "
                "engine that returns them (vLLM on a GPU, with enable_return_routed_experts)"
            )


def _check_logprobs(answer: Answer) -> None:
    """One for each token, which a sampler could have drawn by it."""
    count = len(answer.tokens)
    if len(answer.logprobs) != count:
        raise BadAnswer(f"{len(answer.logprobs)} log-probabilities for {count} tokens")
    inside = (answer.logprobs >= LEAST_LOGPROB) & (answer.logprobs <= 1e-3)  # NaN is not
    if not inside.all():
        raise BadAnswer(
            f"log-probability {answer.logprobs[~inside][0]}; expected finite, at most 0, and at "
            f"least {LEAST_LOGPROB:g}, below which float32 has no probability"
        )


def _check_versions(answer: Answer, versions: Sequence[str]) -> None:
    """Every token is by weights that were asked for, and later ones are not by earlier weights."""
    expected = " or ".join(versions)
    if not answer.versions and len(answer.tokens):
        raise BadAnswer(f"an answer that names no version of its weights; expected {expected}")
    if any(found not in versions for found in answer.versions):
        raise BadAnswer(f"weights of version {' '.join(answer.versions)}; expected {expected}")
    places = [versions.index(found) for found in answer.versions]
    if places != sorted(places):
        raise BadAnswer(f"weights of versions {' '.join(answer.versions)}, in this order")


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
