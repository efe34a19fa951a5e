"""vLLM's own weight transfer: a server started with ``--weight-transfer-config '{"backend":
"nccl"}'`` takes weights through an NCCL group, without an extension of its workers.

The trainer makes the group's id and gives it to the server, whose workers join as the ranks behind
it. Weights come packed, a broadcast of bytes for each request that names them. As the source
of vLLM 0.32 has it; it needs a GPU on both sides and has not been run with NCCL.
"""

from __future__ import annotations

import base64
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from typing import Any, Callable, Protocol, Sequence

import torch

from megatron_rl.rollout.servers.api import BadAnswer, Call, NoAnswer
from megatron_rl.rollout.servers.vllm import VllmApi

#: Asks one server; gives what the function makes of its response.
Ask = Callable[[Call, Callable[[Any], Any]], Any]
#: Name, type and shape of a weight.
Entry = tuple[str, str, list[int]]

#: Bytes that the workers take for one broadcast at most, unless the last weight is larger.
PACKED_BYTES = 256 << 20


class Link(Protocol):
    """The trainer's end of the group."""

    def id(self) -> bytes:
        """Of the group, for those who are to join it."""

    def join(self, size: int) -> None:
        """Be its rank 0; returns when all are there."""

    def broadcast(self, tensor: torch.Tensor) -> None:
        """From rank 0, bytes."""


class NcclLink:
    """`Link` of NCCL."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._id, self._comm = device, torch.cuda.nccl.unique_id(), None

    def id(self) -> bytes:
        """See `Link`."""
        return self._id

    def join(self, size: int) -> None:
        """See `Link`. vLLM's workers begin with a sum of one number each."""
        with torch.cuda.device(self._device):
            self._comm = torch.cuda.nccl.init_rank(size, self._id, 0)
            number = torch.zeros(1, device=self._device)
            torch.cuda.nccl.all_reduce([number], comms=[self._comm])
            torch.cuda.synchronize()

    def broadcast(self, tensor: torch.Tensor) -> None:
        """See `Link`."""
        with torch.cuda.device(self._device):
            torch.cuda.nccl.broadcast([tensor], comms=[self._comm])
            torch.cuda.current_stream().synchronize()


def offers_transfer(api: VllmApi, ask: Ask) -> bool:
    """Whether a server takes weights through a group whose id it is given.

    It is asked to join one with an id that is none, which changes nothing: only a server that can
    complains of the id.
    """
    wrong = {"nccl_unique_id_b64": "?", "rank_offset": 1, "world_size": 2}
    try:
        ask(api.joining(wrong), lambda payload: None)
    except NoAnswer:
        raise
    except BadAnswer as refusal:
        return "nccl_unique_id_b64 is not valid" in str(refusal)
    return False


class TransferChannel:
    """`broadcast.Channel` over these routes."""

    def __init__(
        self,
        api: VllmApi,
        ask: Ask,
        link: Link,
        timeout: timedelta,
    ) -> None:
        """Form the group with the server's workers."""
        self._api, self._ask, self._seconds = api, ask, timeout.total_seconds()
        self._threads, self._link = ThreadPoolExecutor(1), link
        size = 1 + ask(api.counting(), api.count)
        information = {
            "nccl_unique_id_b64": base64.b64encode(self._link.id()).decode(),
            "rank_offset": 1,
            "world_size": size,
            "packed": True,
            "packed_buffer_size_bytes": PACKED_BYTES,
        }
        joined = self._threads.submit(ask, api.joining(information), _nothing)
        here = _beside(self._link.join, size)
        joined.result(self._seconds)
        here.result(self._seconds)

    def start(self, number: int) -> None:
        """See `Channel`. An update that was broken off is still open, and is closed first: all
        weights come again.
        """
        try:
            self._ask(self._api.starting(), _nothing)
        except NoAnswer:
            raise
        except BadAnswer:
            self._ask(self._api.finishing(), _nothing)
            self._ask(self._api.starting(), _nothing)

    def reads(self) -> bool:
        """See `Channel`: they read what a request names."""
        return True

    def send(self, entries: Sequence[Entry], payload: torch.Tensor) -> Callable[[], None]:
        """See `Channel`."""
        taken: Future[Any] = self._threads.submit(self._ask, self._api.updating(entries), _nothing)
        sent = _beside(self._link.broadcast, payload)

        def wait() -> None:
            taken.result(self._seconds)
            sent.result(self._seconds)

        return wait

    def end(self) -> Callable[[], None]:
        """See `Channel`."""
        finished = self._threads.submit(self._ask, self._api.finishing(), _nothing)
        return lambda: finished.result(self._seconds)


def _nothing(payload: Any) -> None:
    """What the responses hold."""


def _beside(function: Callable[[Any], object], argument: Any) -> Future[Any]:
    """Run it in a thread that the process does not wait for at its end: what has been begun with a
    worker that is gone does not come back.
    """
    done: Future[Any] = Future()

    def run() -> None:
        try:
            done.set_result(function(argument))
        except RuntimeError as error:
            done.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return done
