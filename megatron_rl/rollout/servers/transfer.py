"""Weights by vLLM's own weight transfer. A server started with ``--weight-transfer-config
'{"backend": "nccl"}'`` receives weights through an NCCL group and needs no worker extension.

The trainer makes the group's id and sends it to the server. The workers join as ranks 1 and up. A
call names some weights, and one broadcast carries their bytes. This follows the source of vLLM
0.32. It needs GPUs on both sides and has not been run with NCCL.
"""

from __future__ import annotations

import base64
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from typing import Any, Protocol, Sequence

import torch

from megatron_rl.rollout.daemon_thread import in_daemon_thread
from megatron_rl.rollout.servers.api import BadAnswer, BroadcastApi, NoAnswer
from megatron_rl.rollout.servers.channel import FAILURES, Ask, Entry, Wait

#: Most bytes in one broadcast, without its last weight. The workers expect the same number.
PACKED_BYTES = 256 << 20


class Link(Protocol):
    """The trainer's end of a group, with rank 0."""

    def id(self) -> bytes:
        """The group's id, with which the workers join."""

    def join(self, size: int) -> None:
        """Join as rank 0; returns when all ``size`` ranks have joined."""

    def broadcast(self, tensor: torch.Tensor) -> None:
        """Send bytes from rank 0 to all others."""


class NcclLink:
    """`Link` by NCCL."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._id, self._comm = device, torch.cuda.nccl.unique_id(), None

    def id(self) -> bytes:
        """See `Link`."""
        return self._id

    def join(self, size: int) -> None:
        """See `Link`. vLLM's workers begin with an all-reduce of one number."""
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


def offers_transfer(api: BroadcastApi, ask: Ask) -> bool:
    """Whether a server has the weight transfer.

    It gets a malformed id, which changes nothing. Only a server with the transfer complains of the
    id.
    """
    wrong = {"nccl_unique_id_b64": "?", "rank_offset": 1, "world_size": 2}
    try:
        ask(api.join_call(wrong), lambda payload: None)
    except NoAnswer:
        raise
    except BadAnswer as refusal:
        return "nccl_unique_id_b64 is not valid" in str(refusal)
    return False


class TransferChannel:
    """`channel.Channel` by the weight transfer."""

    def __init__(
        self,
        api: BroadcastApi,
        ask: Ask,
        link: Link,
        timeout: timedelta,
    ) -> None:
        """Form the group with the server's workers."""
        self._api, self._ask, self._seconds = api, ask, timeout.total_seconds()
        self._threads, self._link = ThreadPoolExecutor(1), link
        size = 1 + ask(api.world_size_call(), api.read_world_size)
        information = {
            "nccl_unique_id_b64": base64.b64encode(self._link.id()).decode(),
            "rank_offset": 1,
            "world_size": size,
            "packed": True,
            "packed_buffer_size_bytes": PACKED_BYTES,
        }
        joined = self._threads.submit(ask, api.join_call(information), _nothing)
        here = in_daemon_thread(self._link.join, size, name="weights")
        joined.result(self._seconds)
        self._finish(here)

    def _finish(self, here: Future[Any]) -> None:
        """Wait for a call of the link. Whatever it raises concerns one server, so it is raised as
        one of ``FAILURES``: anything else would end this rank alone.
        """
        error = here.exception(self._seconds)
        if isinstance(error, FAILURES):
            raise error
        if error is not None:
            raise RuntimeError(f"{type(error).__name__}: {error}") from error

    def start(self, number: int) -> None:
        """See `Channel`. If the last update broke off, the server refuses a new one. Then that
        update is finished first; all weights are sent again anyway.
        """
        try:
            self._ask(self._api.start_call(), _nothing)
        except NoAnswer:
            raise
        except BadAnswer:
            self._ask(self._api.finish_call(), _nothing)
            self._ask(self._api.start_call(), _nothing)

    def reads(self) -> bool:
        """See `Channel`. Workers read when a call names weights, so always."""
        return True

    def send(self, entries: Sequence[Entry], payload: torch.Tensor) -> Wait:
        """See `Channel`."""
        taken: Future[Any] = self._threads.submit(
            self._ask, self._api.update_call(entries), _nothing
        )
        sent = in_daemon_thread(self._link.broadcast, payload, name="weights")

        def wait() -> None:
            taken.result(self._seconds)
            self._finish(sent)

        return wait

    def end(self) -> Wait:
        """See `Channel`."""
        finished = self._threads.submit(self._ask, self._api.finish_call(), _nothing)
        return lambda: finished.result(self._seconds)


def _nothing(payload: Any) -> None:
    """Reads a response whose content does not matter."""
