"""What an inference server is asked and what it answers, whatever its kind."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Collection, Protocol, Sequence

import numpy as np

from megatron_rl.records import Prompt
from megatron_rl.rollout.engine import SamplingSettings


class BadAnswer(Exception):
    """A server's answer is not one to the question, or not by the weights that were asked for."""


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
        if routes is not None and self.routed_experts is not None:
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
    versions: Collection[str],
    may_be_aborted: bool = False,
) -> None:
    """Refuse what could not have been sampled from the policy.

    An answer ends with the first token of ``stop_ids``, or has ``settings.max_new_tokens`` tokens.

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
        if len(answer.logprobs) != count:
            raise BadAnswer(f"{len(answer.logprobs)} log-probabilities for {count} tokens")
        largest = answer.logprobs.max(initial=-np.inf)
        if not np.isfinite(answer.logprobs).all() or largest > 1e-3:
            raise BadAnswer(f"log-probability {largest}; expected finite, at most 0")
        _check_end(answer, settings.max_new_tokens, sorted(stop_ids))
        if any(found not in versions for found in answer.versions):
            raise BadAnswer(
                f"weights of version {' '.join(answer.versions)}; expected {' or '.join(versions)}"
            )
        routes, tokens = answer.routed_experts, len(prompt.tokens) + count - 1
        if (
            settings.routes
            and count
            and (routes is None or routes.ndim != 3 or len(routes) != tokens)
        ):
            raise BadAnswer(
                "no experts of its tokens, which algorithm.routing_replay r3 needs; expected a "
                "server that returns them (vLLM on a GPU, with enable_return_routed_experts)"
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
    if not (answer.stopped or answer.aborted or len(places) or len(answer.tokens) == longest):
        raise BadAnswer(
            f"an answer that ends after {len(answer.tokens)} tokens without a stop token; expected "
            f"{longest}, or one of {named}"
        )
