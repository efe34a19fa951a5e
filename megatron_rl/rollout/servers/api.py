"""The HTTP calls to an inference server, and what its responses become, whatever its kind."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, Sequence, TypeVar

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from megatron_rl.records import KeptTokens, Prompt
from megatron_rl.rollout.engine import SamplingSettings

#: Largest response to a call that asks for no answers, bytes.
CONTROL_BYTES = 1 << 20


class BadAnswer(Exception):
    """A server gave no response, or one that is not what it was asked for."""


class NoAnswer(BadAnswer):
    """A server sent no HTTP response before the deadline."""


class Message(BaseModel):
    """Base of the messages that servers send. Types must match exactly; other keys are ignored."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)


MessageT = TypeVar("MessageT", bound=Message)


def parse_message(kind: type[MessageT], payload: Any, route: str) -> MessageT:
    """The response of a route as a message of this kind. Raises `BadAnswer`."""
    try:
        return kind.model_validate(payload)
    except ValidationError as error:
        (first, *_) = error.errors(include_url=False, include_input=False, include_context=False)
        place = ".".join(map(str, first["loc"])) or "it"
        raise BadAnswer(f"not a response of {route} ({place}: {first['msg']})") from None


@dataclass(frozen=True)
class Call:
    """One HTTP call."""

    path: str
    body: dict[str, Any] | None  #: of a POST; None: a GET


@dataclass(frozen=True)
class Answer:
    """One sampled answer, as the server sent it."""

    tokens: np.ndarray  #: int64 [N]
    logprobs: np.ndarray  #: float32 [N]
    stopped: bool  #: it ended with a stop token, not at the length limit
    #: of the weights that sampled its tokens, in order; (): the server does not name them
    versions: tuple[str, ...]
    routed_experts: np.ndarray | None = None  #: integers [P + N - 1, L, K], of every MoE layer
    aborted: bool = False  #: the server was paused in the middle of it; it is to be continued
    kept: KeptTokens | None = None  #: N sets; None: the server gave none

    def continued(self, rest: Answer, prompt_length: int) -> Answer:
        """This aborted answer, joined with its continuation ``rest``."""
        routes = rest.routed_experts
        if routes is not None and self.routed_experts is not None and len(self.tokens):
            # The server computed the tokens of this part again, with new weights. Keep the experts
            # of the weights that sampled them.
            kept = prompt_length + len(self.tokens) - 1
            routes = np.concatenate([self.routed_experts[:kept], routes[kept:]])
        return Answer(
            np.concatenate([self.tokens, rest.tokens]),
            np.concatenate([self.logprobs, rest.logprobs]),
            rest.stopped,
            self.versions + rest.versions,
            routes,
            rest.aborted,
            _joined(self.kept, rest.kept),
        )


def _joined(first: KeptTokens | None, rest: KeptTokens | None) -> KeptTokens | None:
    return None if first is None or rest is None else KeptTokens.join([first, rest])


def kept_tokens(sets: Sequence[Sequence[int]]) -> KeptTokens:
    """The record of the sets that a server sent, one for each token."""
    ids = np.array([number for each in sets for number in each], dtype=np.int32)
    return KeptTokens.of_sizes(ids, np.array([len(each) for each in sets], dtype=np.int64))


def logprob_array(values: Sequence[float]) -> np.ndarray:
    """float32 [N]. A value beyond float32 becomes infinite, and `check_answers` refuses it."""
    with np.errstate(over="ignore"):
        return np.array(values, dtype=np.float64).astype(np.float32)


class ServerApi(Protocol):
    """What every kind of server can do: sample answers, load weights from a disk, and pause."""

    def generate_call(
        self, prompt: Prompt, settings: SamplingSettings, seed: int, stop_ids: Sequence[int]
    ) -> Call:
        """Sample ``settings.samples`` answers. An answer ends with the first of ``stop_ids``."""

    def read_answers(self, payload: Any) -> list[Answer]:
        """The answers in the response to `generate_call`. Raises `BadAnswer`."""

    def load_calls(self, directory: str, version: str) -> Sequence[Call]:
        """Load the weights in a directory that the server can read, and name them ``version``. The
        last call alone is enough for a server that was started with these weights.
        """

    def pause_calls(self) -> Sequence[Call]:
        """Abort all answers, send what there is of them, and start no other until resumed."""

    def resume_calls(self) -> Sequence[Call]:
        """Sample again after a pause."""


class BroadcastApi(ServerApi, Protocol):
    """What a server can do that also takes weights from a process group."""

    def version_calls(self, version: str) -> Sequence[Call]:
        """Name the weights that a broadcast brought, and forget what was cached of the old ones."""

    # -- by methods of a worker extension (`reload.py`)

    def worker_call(self, method: str, arguments: list[Any]) -> Call:
        """Call a method of every worker."""

    def read_results(self, payload: Any) -> list[Any]:
        """What each worker returned to `worker_call`. Raises `BadAnswer`."""

    # -- by the server's own weight transfer (`transfer.py`)

    def world_size_call(self) -> Call:
        """Ask for the number of workers."""

    def read_world_size(self, payload: Any) -> int:
        """The number in the response to `world_size_call`. Raises `BadAnswer`."""

    def join_call(self, information: dict[str, Any]) -> Call:
        """Have the workers join the trainer's group."""

    def start_call(self) -> Call:
        """Begin an update of the weights."""

    def update_call(self, entries: Sequence[tuple[str, str, list[int]]]) -> Call:
        """Receive these weights, (name, type, shape), from the group."""

    def finish_call(self) -> Call:
        """End the update."""
