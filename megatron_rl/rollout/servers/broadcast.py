"""Weights to the servers' workers through process groups, without a disk.

Rank 0 of the trainer and the workers of one server form a group (NCCL on CUDA, else gloo), made
when the server gets its first weights. How the workers are told what comes is a matter of the
channel: by vLLM's own weight transfer (`transfer.py`) where the server says that it has it, else by
the extension of its workers (`reload.py` is the other end).
"""

from __future__ import annotations

import json
import socket
import time
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as NotInTime
from datetime import timedelta
from functools import partial
from typing import Any, Callable, Iterable, Protocol, Sequence
from urllib.parse import urlsplit

import torch
from torch.distributed import BroadcastOptions, PrefixStore, TCPStore, Work

from megatron_rl.errors import one_line
from megatron_rl.rollout.servers.api import BadAnswer
from megatron_rl.rollout.servers.keys import listening
from megatron_rl.rollout.servers.transfer import (
    PACKED_BYTES,
    Ask,
    Entry,
    Link,
    NcclLink,
    TransferChannel,
    offers_transfer,
)
from megatron_rl.rollout.servers.vllm import VllmApi

#: Bytes of weights sent at a time, not counting the last of them.
BATCH_BYTES = PACKED_BYTES

#: Seconds between two looks at who reads.
POLL_S = 0.005

Tensors = Iterable[tuple[str, torch.Tensor]]
#: What may go wrong with one server, without harm to the others.
Failures = (BadAnswer, RuntimeError, OSError, TimeoutError, NotInTime)


class Channel(Protocol):
    """To one server's workers. Each method raises one of ``Failures``."""

    def start(self, number: int) -> None:
        """Tell them that weights come, for this time."""

    def reads(self) -> bool:
        """Whether all of them read."""

    def send(self, entries: Sequence[Entry], payload: torch.Tensor) -> Callable[[], None]:
        """Begin to send some weights, the bytes of all behind one another; waits until it is
        done."""

    def end(self) -> Callable[[], None]:
        """There are no more; waits until they have them."""


class WeightBroadcast:
    """On rank 0: the channels to the servers."""

    def __init__(
        self,
        api: VllmApi,
        device: torch.device,
        seconds: float,
        link: Callable[[torch.device], Link] | None = None,
    ) -> None:
        """
        Args:
            api: of the servers.
            device: of the weights.
            seconds: longest wait for a server, in any one step. Servers wait for twice as long, so
                that one that stops does not take the others with it.
            link: makes the trainer's end of a group of vLLM's weight transfer; None: that of NCCL
                on CUDA, and elsewhere no server is asked for a transfer.
        """
        self._link = link or (NcclLink if device.type == "cuda" else None)
        self._api, self._device, self._timeout = api, device, timedelta(seconds=seconds)
        self._channels: dict[str, Channel] = {}
        self._sends = 0

    def join(self, url: str, ask: Ask) -> None:
        """Make the channel to a server, unless it is there. Raises one of ``Failures``."""
        if url in self._channels:
            return
        if self._link is not None and offers_transfer(self._api, ask):
            link = self._link(self._device)
            channel: Channel = TransferChannel(self._api, ask, link, self._timeout)
        else:
            channel = ExtensionChannel(self._api, ask, self._device, self._timeout, url)
        self._channels[url] = channel

    def forget(self, url: str) -> None:
        """The channel to this server is of no use any more."""
        self._channels.pop(url, None)

    def send(self, tensors: Tensors, urls: Sequence[str]) -> dict[str, str]:
        """Send the tensors to all servers that have joined; why it failed, for those it did.

        Args:
            tensors: consumed to the end, whatever fails.
            urls: of the servers.
        """
        failures: dict[str, str] = {}
        self._sends += 1

        def each(step: Callable[[str], None], urls: Iterable[str] = urls) -> None:
            for url in urls:
                if url not in failures:
                    try:
                        step(url)
                    except Failures as error:
                        failures[url] = one_line(error)

        def all_at_once(begin: Callable[[Channel], Callable[[], None]]) -> None:
            begun: dict[str, Callable[[], None]] = {}
            each(lambda url: begun.update({url: begin(self._channels[url])}))
            each(lambda url: begun[url](), list(begun))

        each(lambda url: self._channels[url].start(self._sends))
        end = time.monotonic() + self._timeout.total_seconds()
        each(lambda url: self._await_reader(url, end))
        for batch in _batches(tensors, self._device):
            all_at_once(partial(_send, *batch))
        all_at_once(lambda channel: channel.end())
        for url in failures:
            self.forget(url)
        return failures

    def _await_reader(self, url: str, end: float) -> None:
        """Until all workers of the server read, or it is known that they won't: what gloo has
        begun to send can't be called back."""
        while not self._channels[url].reads():
            if time.monotonic() > end:
                seconds = self._timeout.total_seconds()
                raise NotInTime(f"it did not begin to read in {seconds:g} s")
            time.sleep(POLL_S)


class ExtensionChannel:
    """`Channel` to workers with the extension `reload.Reload`.

    The group's store is told by each worker when it begins to read. Each batch is sent as three
    broadcasts: the length of a header, the header (names, types and shapes as JSON), and all bytes;
    an empty header ends the weights.
    """

    def __init__(
        self, api: VllmApi, ask: Ask, device: torch.device, timeout: timedelta, url: str
    ) -> None:
        """Form the group with the workers of the server at ``url``."""
        self._device, self._timeout = device, timeout
        self._call = lambda method, arguments: ask(api.of_workers(method, arguments), api.results)
        self._threads = ThreadPoolExecutor(1)
        self._answer: Future[Any] | None = None
        backend = "nccl" if device.type == "cuda" else "gloo"
        size, host = 1 + len(self._call("count", [])), _address_towards(url)
        store = _store(host, timeout)
        arguments = [host, store.port, backend, size, 2 * timeout.total_seconds()]
        joined = self._threads.submit(self._call, "join_weights", arguments)
        self._store, self._size = store, size
        self._group = make_group(store, 0, size, backend, timeout)
        _begin(self._group, torch.zeros(1, dtype=torch.int64, device=device)).wait()
        joined.result(timeout.total_seconds())  # and now it is there

    def start(self, number: int) -> None:
        """See `Channel`."""
        self._number = number
        self._answer = self._threads.submit(self._call, "receive_weights", [number])

    def reads(self) -> bool:
        """See `Channel`."""
        self._refuse_answer("it did not read")
        return self._store.check([f"reads/{self._number}/{n}" for n in range(1, self._size)])

    def send(self, entries: Sequence[Entry], payload: torch.Tensor) -> Callable[[], None]:
        """See `Channel`."""
        self._refuse_answer("it has stopped reading")
        header = bytearray(json.dumps(entries).encode())
        text = torch.frombuffer(header, dtype=torch.uint8).to(self._device)
        works = [_begin(self._group, part) for part in (self._length(len(header)), text, payload)]

        def wait() -> None:
            for work in works:
                work.wait()

        return wait

    def end(self) -> Callable[[], None]:
        """See `Channel`."""
        self._refuse_answer("it has stopped reading")
        last = _begin(self._group, self._length(0))

        def wait() -> None:
            last.wait()
            assert self._answer is not None, "start has asked for it"
            self._answer.result(self._timeout.total_seconds())

        return wait

    def _length(self, count: int) -> torch.Tensor:
        return torch.tensor([count], dtype=torch.int64, device=self._device)

    def _refuse_answer(self, why: str) -> None:
        """An answer that comes before the end of the weights, whatever it says."""
        assert self._answer is not None, "start has asked for it"
        if self._answer.done():
            self._answer.result()
            raise BadAnswer(why)


def _store(host: str, timeout: timedelta) -> TCPStore:
    """Where a group meets: on this address of the machine, and not on all of them."""
    server = listening(host)
    port = server.getsockname()[1]
    return TCPStore(
        host,
        port,
        is_master=True,
        timeout=timeout,
        wait_for_workers=False,
        master_listen_fd=server.detach(),
    )


def make_group(store: TCPStore, rank: int, size: int, backend: str, timeout: timedelta) -> Any:
    """A group beside those of torch.distributed, which are one set in each process."""
    prefixed = PrefixStore("weights", store)
    if backend == "gloo":
        from torch.distributed import ProcessGroupGloo

        return ProcessGroupGloo(prefixed, rank, size, timeout)
    from torch.distributed import ProcessGroupNCCL

    options = ProcessGroupNCCL.Options()
    options._timeout = timeout
    return ProcessGroupNCCL(prefixed, rank, size, options)


def _address_towards(url: str) -> str:
    """The address of this machine as a server sees it."""
    parts = urlsplit(url)
    port = parts.port or {"http": 80, "https": 443}[parts.scheme]
    with socket.create_connection((parts.hostname, port), timeout=10.0) as towards:
        return towards.getsockname()[0]


def _send(entries: list[Entry], payload: torch.Tensor, channel: Channel) -> Callable[[], None]:
    return channel.send(entries, payload)


def _begin(group: Any, tensor: torch.Tensor) -> Work:
    return group.broadcast([tensor], BroadcastOptions())


def _batches(tensors: Tensors, device: torch.device) -> Iterable[tuple[list[Entry], torch.Tensor]]:
    """(names, types and shapes; all bytes) of some tensors at a time: not more than
    ``BATCH_BYTES``, but for the last of them.
    """
    waiting: list[tuple[str, torch.Tensor]] = []
    size = 0
    for name, tensor in tensors:
        waiting.append((name, tensor))
        size += tensor.nbytes
        if size >= BATCH_BYTES:
            yield _packed(waiting, device)
            waiting, size = [], 0
    if waiting:
        yield _packed(waiting, device)


def _packed(
    tensors: Sequence[tuple[str, torch.Tensor]], device: torch.device
) -> tuple[list[Entry], torch.Tensor]:
    entries = [(name, str(t.dtype).removeprefix("torch."), list(t.shape)) for name, t in tensors]
    flat = [t.to(device).contiguous().view(-1).view(torch.uint8) for _, t in tensors]
    return entries, torch.cat(flat)
