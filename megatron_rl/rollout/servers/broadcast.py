"""Weights to the servers' workers through process groups, without a disk.

Rank 0 of the trainer forms a group with the workers of each server (NCCL on CUDA, else gloo), when
the server gets its first weights. A server with vLLM's own weight transfer has a `TransferChannel`.
Any other server has an `ExtensionChannel`, and its workers need the extension `reload.Reload`.
"""

from __future__ import annotations

import time
from concurrent.futures import TimeoutError as NotInTime
from datetime import timedelta
from functools import partial
from typing import Callable, Iterable, Sequence

import torch

from megatron_rl.errors import one_line
from megatron_rl.rollout.servers.api import BroadcastApi
from megatron_rl.rollout.servers.channel import FAILURES, Ask, Channel, Entry, Wait
from megatron_rl.rollout.servers.extension import ExtensionChannel
from megatron_rl.rollout.servers.transfer import (
    PACKED_BYTES,
    Link,
    NcclLink,
    TransferChannel,
    offers_transfer,
)

#: Bytes of weights in one batch, without its last weight.
BATCH_BYTES = PACKED_BYTES

#: Seconds between two looks at whether the workers read.
POLL_S = 0.005

Tensors = Iterable[tuple[str, torch.Tensor]]


class WeightBroadcast:
    """The channels from rank 0 to the servers."""

    def __init__(
        self,
        api: BroadcastApi,
        device: torch.device,
        seconds: float,
        link: Callable[[torch.device], Link] | None = None,
    ) -> None:
        """
        Args:
            api: of the kind of server.
            device: of the weights.
            seconds: longest wait for a server in one step. Servers wait twice as long, so that one
                server that stops does not make the others fail.
            link: makes the trainer's end of a weight transfer. None: NCCL on CUDA; elsewhere no
                server is asked for a transfer.
        """
        self._link = link or (NcclLink if device.type == "cuda" else None)
        self._api, self._device, self._timeout = api, device, timedelta(seconds=seconds)
        self._channels: dict[str, Channel] = {}
        self._updates = 0

    def join(self, url: str, ask: Ask) -> None:
        """Make the channel to a server, unless there is one. Raises one of ``FAILURES``."""
        if url in self._channels:
            return
        if self._link is not None and offers_transfer(self._api, ask):
            link = self._link(self._device)
            channel: Channel = TransferChannel(self._api, ask, link, self._timeout)
        else:
            channel = ExtensionChannel(self._api, ask, self._device, self._timeout, url)
        self._channels[url] = channel

    def forget(self, url: str) -> None:
        """Drop the channel to a server; it has to join again."""
        self._channels.pop(url, None)

    def send(self, tensors: Tensors, urls: Sequence[str]) -> dict[str, str]:
        """Send the weights to servers that have joined.

        Args:
            tensors: name and weight. Consumed to the end, whatever fails.
            urls: of the servers.

        Returns:
            The urls of the servers that failed, and why. Their channels are dropped.
        """
        failures: dict[str, str] = {}
        self._updates += 1

        def each(step: Callable[[str], None], urls: Iterable[str] = urls) -> None:
            for url in urls:
                if url not in failures:
                    try:
                        step(url)
                    except FAILURES as error:
                        failures[url] = one_line(error)

        def all_at_once(begin: Callable[[Channel], Wait]) -> None:
            waits: dict[str, Wait] = {}
            each(lambda url: waits.update({url: begin(self._channels[url])}))
            each(lambda url: waits[url](), list(waits))

        each(lambda url: self._channels[url].start(self._updates))
        end = time.monotonic() + self._timeout.total_seconds()
        each(lambda url: self._await_reader(url, end))
        for batch in _batches(tensors, self._device):
            all_at_once(partial(_send, *batch))
        all_at_once(lambda channel: channel.end())
        for url in failures:
            self.forget(url)
        return failures

    def _await_reader(self, url: str, end: float) -> None:
        """Wait until all workers of the server read. A broadcast that gloo has begun cannot be
        taken back.
        """
        while not self._channels[url].reads():
            if time.monotonic() > end:
                seconds = self._timeout.total_seconds()
                raise NotInTime(f"it did not begin to read in {seconds:g} s")
            time.sleep(POLL_S)


def _send(entries: list[Entry], payload: torch.Tensor, channel: Channel) -> Wait:
    return channel.send(entries, payload)


def _batches(tensors: Tensors, device: torch.device) -> Iterable[tuple[list[Entry], torch.Tensor]]:
    """(entries, bytes) of one batch of weights after the other. A batch is full when it has
    ``BATCH_BYTES``.
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
