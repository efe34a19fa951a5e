"""Weights by the worker extension `reload.Reload`: the trainer's end of its process group."""

from __future__ import annotations

import json
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from typing import Any, Sequence

import torch
from torch.distributed import BroadcastOptions, PrefixStore, TCPStore, Work

from megatron_rl.rollout.servers.addresses import address_towards, listening
from megatron_rl.rollout.servers.api import BadAnswer, BroadcastApi
from megatron_rl.rollout.servers.channel import Ask, Entry, Wait


class ExtensionChannel:
    """`channel.Channel` to workers with the extension.

    Each worker tells the group's store when it begins to read. A batch of weights is three
    broadcasts: the length of a header, the header (names, types and shapes as JSON), and the bytes.
    A header of length 0 ends the update.
    """

    def __init__(
        self, api: BroadcastApi, ask: Ask, device: torch.device, timeout: timedelta, url: str
    ) -> None:
        """Form the group with the workers of the server at ``url``.

        Raises:
            One of ``FAILURES``.
        """
        self._device, self._timeout = device, timeout
        self._api, self._ask = api, ask
        self._threads = ThreadPoolExecutor(1)
        self._update: Future[Any] = Future()  #: the workers' response to the update under way
        backend = "nccl" if device.type == "cuda" else "gloo"
        size, host = 1 + len(self._call("count", [])), address_towards(url)
        store = open_store(host, timeout)
        arguments = [host, store.port, backend, size, 2 * timeout.total_seconds()]
        joined = self._threads.submit(self._call, "join_weights", arguments)
        self._store, self._size = store, size
        self._group = _make_group(store, size, backend, timeout)
        _broadcast(self._group, torch.zeros(1, dtype=torch.int64, device=device)).wait()
        joined.result(timeout.total_seconds())

    def start(self, number: int) -> None:
        """See `Channel`."""
        self._number = number
        self._update = self._threads.submit(self._call, "receive_weights", [number])

    def reads(self) -> bool:
        """See `Channel`."""
        self._refuse_response("it did not read")
        return self._store.check([f"reads/{self._number}/{n}" for n in range(1, self._size)])

    def send(self, entries: Sequence[Entry], payload: torch.Tensor) -> Wait:
        """See `Channel`."""
        self._refuse_response("it has stopped reading")
        header = bytearray(json.dumps(entries).encode())
        text = torch.frombuffer(header, dtype=torch.uint8).to(self._device)
        parts = (self._length(len(header)), text, payload)
        works = [_broadcast(self._group, part) for part in parts]

        def wait() -> None:
            for work in works:
                work.wait()

        return wait

    def end(self) -> Wait:
        """See `Channel`."""
        self._refuse_response("it has stopped reading")
        last = _broadcast(self._group, self._length(0))

        def wait() -> None:
            last.wait()
            self._update.result(self._timeout.total_seconds())

        return wait

    def _call(self, method: str, arguments: list[Any]) -> list[Any]:
        """What each worker's method returns."""
        found: list[Any] = self._ask(
            self._api.worker_call(method, arguments), self._api.read_results
        )
        return found

    def _length(self, count: int) -> torch.Tensor:
        return torch.tensor([count], dtype=torch.int64, device=self._device)

    def _refuse_response(self, why: str) -> None:
        """The workers have failed if they respond before the update ends, whatever they say."""
        if self._update.done():
            self._update.result()
            raise BadAnswer(why)


def open_store(host: str, timeout: timedelta) -> TCPStore:
    """The store of a group, which listens on this one address of the machine."""
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


def _make_group(store: TCPStore, size: int, backend: str, timeout: timedelta) -> Any:
    """Rank 0's end of a group apart from those of torch.distributed, which holds one set of groups
    for a process.
    """
    prefixed = PrefixStore("weights", store)
    if backend == "gloo":
        from torch.distributed import ProcessGroupGloo

        return ProcessGroupGloo(prefixed, 0, size, timeout)
    from torch.distributed import ProcessGroupNCCL

    options = ProcessGroupNCCL.Options()
    options._timeout = timeout
    return ProcessGroupNCCL(prefixed, 0, size, options)


def _broadcast(group: Any, tensor: torch.Tensor) -> Work:
    return group.broadcast([tensor], BroadcastOptions())
