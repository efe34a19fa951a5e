"""Weights to the servers through process groups."""

from __future__ import annotations

from functools import partial
from typing import Any, Callable, Sequence

import torch

from megatron_rl.config.schema import Config
from megatron_rl.errors import one_line
from megatron_rl.parallel.collective_try import by_first, collective_try
from megatron_rl.parallel.groups import Groups
from megatron_rl.rollout.servers.api import BadAnswer, BroadcastApi, Call
from megatron_rl.rollout.servers.broadcast import WeightBroadcast
from megatron_rl.rollout.servers.channel import FAILURES
from megatron_rl.rollout.servers.pool import Request, ServerPool
from megatron_rl.weights.export import describe, gather_weights


class BroadcastDelivery:
    """`sync.WeightDelivery` by broadcasts: the ranks send rank 0 their weights, and rank 0 sends
    them to the servers' workers.
    """

    def __init__(
        self,
        config: Config,
        api: BroadcastApi,
        chunks: Sequence[torch.nn.Module],
        groups: Groups,
        warn: Callable[[str], None],
    ) -> None:
        """warn: shows the user a line."""
        self._api, self._chunks, self._groups, self._warn = api, chunks, groups, warn
        self._model = config.model
        self._family, _ = describe(config.model, config.model.hf_path)
        self._pauses = config.rollout.lag > 1  # answers may be under way during an update
        device = next(chunks[0].parameters()).device
        self._sender = WeightBroadcast(api, device, config.rollout.servers.start_s)
        self._failed: dict[str, str] = {}  #: servers that did not take this version, and why

    def prepare(self, version: int) -> None:
        """Nothing."""

    def deliver(self, pool: ServerPool, version: int) -> list[str]:
        """Send the weights. A collective.

        Returns:
            The urls of the servers that have received them.
        """
        world, is_first = self._groups.world, self._groups.world.rank() == 0
        collective_try(world, lambda: self._join(pool) if is_first else None)
        weights = gather_weights(self._chunks, self._groups, self._model, self._family)
        if is_first:
            joined = [url for url in pool.urls if url not in self._failed]
            self._failed |= self._sender.send(weights, joined)
        else:
            for _ in weights:  # each step sends a part to rank 0
                pass
        return by_first(world, lambda: self._finish(pool, version))

    def revive(self, pool: ServerPool, version: int) -> None:
        """Nothing: a run that broadcasts starts no servers."""

    def _join(self, pool: ServerPool) -> None:
        """Pause the servers, and form a group with each."""
        self._failed = {}
        for url in pool.urls:
            try:
                for call in self._api.pause_calls() if self._pauses else ():
                    pool.send(url, call)
                self._sender.join(url, partial(_ask, pool, url))
            except FAILURES as error:
                self._failed[url] = one_line(error)

    def _finish(self, pool: ServerPool, version: int) -> list[str]:
        """Tell the servers the version of their weights, and resume them. A server that failed has
        to join again.
        """
        calls = [*self._api.version_calls(str(version))]
        calls += self._api.resume_calls() if self._pauses else ()
        for url in pool.urls:
            try:
                for call in () if url in self._failed else calls:
                    pool.send(url, call)
            except BadAnswer as error:
                self._failed[url] = one_line(error)
        for url, why in self._failed.items():
            self._sender.forget(url)
            self._warn(f"rollout server {url} did not take the weights: {why}")
        return [url for url in pool.urls if url not in self._failed]


def _ask(pool: ServerPool, url: str, call: Call, read: Callable[[Any], Any]) -> Any:
    return pool.ask_one(url, Request(call, read))
