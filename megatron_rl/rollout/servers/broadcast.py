"""Weights to the servers' workers through process groups, without a disk.

Rank 0 of the trainer and the workers of one server form a group (NCCL on CUDA, else gloo), made
when the server gets its first weights. The group's store is told by each worker when it begins to
read; who never does is sent nothing, since what gloo has begun to send can't be called back. Each
batch of tensors is sent as three broadcasts: the length of a header, the header (names, types and
shapes as JSON), and all bytes. `reload.py` is the other end.
"""

from __future__ import annotations

import json
import socket
import time
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as NotInTime
from datetime import timedelta
from typing import Callable, Iterable, Sequence
from urllib.parse import urlsplit

import httpx
import torch
from torch.distributed import BroadcastOptions, PrefixStore, ProcessGroup, TCPStore, Work

from megatron_rl.errors import one_line
from megatron_rl.rollout.servers.api import BadAnswer

#: Bytes of weights sent at a time.
BATCH_BYTES = 256 << 20

#: Seconds between two looks at who reads.
POLL_S = 0.005

Tensors = Iterable[tuple[str, torch.Tensor]]


class WeightBroadcast:
    """On rank 0: the groups with the servers."""

    def __init__(self, device: torch.device, seconds: float) -> None:
        """
        Args:
            device: of the weights.
            seconds: longest wait for a server, in any one step. Servers wait for twice as long, so
                that one that stops does not take the others with it.
        """
        self._device, self._timeout = device, timedelta(seconds=seconds)
        self._groups: dict[str, tuple[ProcessGroup, TCPStore]] = {}
        self._backend = "nccl" if device.type == "cuda" else "gloo"
        self._sends = 0

    def join(self, url: str, call: Callable[[str, list], list]) -> None:
        """Form the group with a server's workers, unless it is there.

        Args:
            url: of the server.
            call: a method of its workers, with arguments; gives what each has returned.

        Raises:
            RuntimeError, OSError: it did not come to that; or what ``call`` raises.
        """
        if url in self._groups:
            return
        size, host = 1 + len(call("count", [])), _address_towards(url)
        store = TCPStore(host, 0, is_master=True, timeout=self._timeout, wait_for_workers=False)
        arguments = [host, store.port, self._backend, size, 2 * self._timeout.total_seconds()]
        with ThreadPoolExecutor(1) as threads:
            joined = threads.submit(call, "join_weights", arguments)
            group = make_group(store, 0, size, self._backend, self._timeout)
            _begin(group, torch.zeros(1, dtype=torch.int64, device=self._device)).wait()
            joined.result()  # and now it is there
        self._groups[url] = (group, store)

    def forget(self, url: str) -> None:
        """The group with this server is of no use any more."""
        self._groups.pop(url, None)

    def send(
        self, tensors: Tensors, urls: Sequence[str], call: Callable[[str, str, list], list]
    ) -> dict[str, str]:
        """Send the tensors to all servers that have joined; why it failed, for those it did.

        Args:
            tensors: consumed to the end, whatever fails.
            urls: of the servers.
            call: as for `join`, with the url before.
        """
        failures: dict[str, str] = {}
        self._sends += 1
        threads = ThreadPoolExecutor(max(1, len(urls)))
        answers = {url: threads.submit(call, url, "receive_weights", [self._sends]) for url in urls}
        self._await_readers(answers, failures)
        for header, payload in _batches(tensors, self._device):
            self._send_batch(header, payload, answers, failures)
        self._send_batch(b"", None, answers, failures)
        for url, answer in answers.items():
            if url not in failures and (why := _failure(answer, self._timeout)):
                failures[url] = why
        threads.shutdown(wait=False)  # of who has failed, the answer may take its time
        for url in failures:
            self.forget(url)
        return failures

    def _await_readers(self, answers: dict[str, Future], failures: dict[str, str]) -> None:
        """Until all workers of each server read, or it is known that they won't."""
        waiting, end = list(answers), time.monotonic() + self._timeout.total_seconds()
        while waiting and time.monotonic() < end:
            for url in list(waiting):
                group, store = self._groups[url]
                if answers[url].done():
                    failures[url] = _failure(answers[url]) or "it did not read"
                elif not store.check([f"reads/{self._sends}/{n}" for n in range(1, group.size())]):
                    continue
                waiting.remove(url)
            time.sleep(POLL_S)
        for url in waiting:
            failures[url] = f"it did not begin to read in {self._timeout.total_seconds():g} s"

    def _send_batch(
        self,
        header: bytes,
        payload: torch.Tensor | None,
        answers: dict[str, Future],
        failures: dict[str, str],
    ) -> None:
        """To all that have not failed, at the same time. An empty header ends the weights."""
        tensors = [torch.tensor([len(header)], dtype=torch.int64, device=self._device)]
        if header:
            text = torch.frombuffer(bytearray(header), dtype=torch.uint8).to(self._device)
            tensors += [text, payload]
        begun: dict[str, list[Work]] = {}
        for url, answer in answers.items():
            if url in failures:
                continue
            if answer.done():
                failures[url] = _failure(answer) or "it has stopped reading"
            else:
                begun[url] = [_begin(self._groups[url][0], tensor) for tensor in tensors]
        for url, works in begun.items():
            try:
                for work in works:
                    work.wait()
            except RuntimeError as error:
                failures[url] = one_line(error)


def make_group(
    store: TCPStore, rank: int, size: int, backend: str, timeout: timedelta
) -> ProcessGroup:
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


def _begin(group: ProcessGroup, tensor: torch.Tensor) -> Work:
    return group.broadcast([tensor], BroadcastOptions())


def _failure(answer: Future, timeout: timedelta = timedelta(0)) -> str | None:
    """Why a server did not do what it was asked; None: it did."""
    try:
        answer.result(timeout.total_seconds())
    except (httpx.HTTPError, BadAnswer, TimeoutError, NotInTime) as error:
        return one_line(error)
    return None


def _batches(tensors: Tensors, device: torch.device) -> Iterable[tuple[bytes, torch.Tensor]]:
    """(header, all bytes) of some tensors at a time."""
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
) -> tuple[bytes, torch.Tensor]:
    header = [[name, str(t.dtype).removeprefix("torch."), list(t.shape)] for name, t in tensors]
    flat = [t.to(device).contiguous().view(-1).view(torch.uint8) for _, t in tensors]
    return json.dumps(header).encode(), torch.cat(flat)
