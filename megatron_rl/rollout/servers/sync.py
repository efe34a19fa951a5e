"""New weights for the servers: deliver them, probe what the servers compute, choose who is used."""

from __future__ import annotations

import time
from typing import Protocol, Sequence

from megatron_rl.errors import RunFailed
from megatron_rl.parallel.collective_try import by_first
from megatron_rl.rollout.engine import EngineParts
from megatron_rl.rollout.servers.addresses import own_address
from megatron_rl.rollout.servers.answer_requests import AnswerRequests
from megatron_rl.rollout.servers.api import BroadcastApi, ServerApi
from megatron_rl.rollout.servers.broadcast_delivery import BroadcastDelivery
from megatron_rl.rollout.servers.disk_delivery import DiskDelivery
from megatron_rl.rollout.servers.keys import given_key, new_key
from megatron_rl.rollout.servers.own_servers import Command, OwnServers
from megatron_rl.rollout.servers.pool import ServerPool
from megatron_rl.rollout.servers.probe import ServerProbe


class WeightDelivery(Protocol):
    """A way of the weights from the trainer to the servers."""

    def prepare(self, version: int) -> None:
        """Do what can be done while the servers still sample with the old weights. A collective."""

    def deliver(self, pool: ServerPool, version: int) -> list[str]:
        """Give the servers the weights; the urls, on all ranks, of those that say that they have
        them. A collective.
        """

    def revive(self, pool: ServerPool, version: int) -> None:
        """Bring back servers that have ended, with these weights. On one rank."""


class WeightSync:
    """Keeps the servers at the trainer's weights, and the pool of servers that have them.

    `send` admits to the pool the servers whose log-probabilities agree with the trainer's, and
    excludes all others until the next weights.
    """

    def __init__(
        self,
        parts: EngineParts,
        api: ServerApi,
        broadcast: BroadcastApi | None,
        command: Command | None,
        requests: AnswerRequests,
    ) -> None:
        """
        Args:
            parts: what the run gives to its engine.
            api: of the kind of server.
            broadcast: as for `ServerEngine`.
            command: as for `ServerEngine`.
            requests: makes those of the probe.

        Raises:
            ValueError: as for `ServerEngine`. UserError: no model family describes the policy.
        """
        config, self._warn = parts.config, parts.warn
        self._config, self._groups, self._meeting = config, parts.groups, parts.meeting
        self._servers = config.rollout.servers
        self._stop, self._closing = parts.stop, False
        self.own: OwnServers | None = None  #: servers that this run starts; None: it starts none
        if self._servers.start:
            if command is None:
                raise ValueError("rollout.servers.start needs the command of a server")
            self.own = OwnServers(command, self._servers.start_s, parts.warn, self._nobody_waits)
        self._delivery: WeightDelivery
        if self._servers.sync == "disk":
            self._delivery = DiskDelivery(
                config, api, parts.chunks, parts.groups, self.own, parts.warn
            )
        elif broadcast is not None:
            self._delivery = BroadcastDelivery(
                config, broadcast, parts.chunks, parts.groups, parts.warn
            )
        else:
            raise ValueError("rollout.servers.sync broadcast needs servers that take a broadcast")
        self._probe = ServerProbe(config, parts.chunks, parts.groups, requests)
        self._pool: ServerPool | None = None  #: None before the first `send`
        self.sent = -1  #: version of the weights that the admitted servers have
        self._seconds, self._difference = 0.0, 0.0

    @property
    def pool(self) -> ServerPool:
        """The servers. RuntimeError: before the first `send`."""
        if self._pool is None:
            raise RuntimeError("no weights have been sent to the rollout servers yet")
        return self._pool

    def send(self, version: int) -> None:
        """Give the servers the trainer's weights, and admit those that compute with them. A
        collective.

        Raises:
            RunFailed: no server has the weights. UserError: the servers' key or rank 0's address is
                unusable.
        """
        began = time.perf_counter()
        key = by_first(self._groups.world, self._key) if self._pool is None else None
        self._delivery.prepare(version)
        if self._pool is None:
            self._pool = self._new_pool(key)
        self._pool.hold()  # until it is known which servers have the weights
        loaded = self._delivery.deliver(self._pool, version)
        self._admit(self._pool, loaded, version)
        self._pool.release()
        self.sent = version
        self._seconds += time.perf_counter() - began

    def metrics(self) -> dict[str, float]:
        """This rank's metrics since the last call; none before the first `send`."""
        if self._pool is None:
            return {}
        taken = {
            "time/sync_s": self._seconds,
            "servers/used": float(len(self._pool.admitted)),
            "servers/probe_difference": self._difference,
            "servers/failures": float(self._pool.take_failures()),
            "servers/restarts": float(0 if self.own is None else self.own.take_restarts()),
        }
        self._seconds = 0.0
        return taken

    def stop_asking(self) -> None:
        """Break off all requests: threads that wait for answers get `RunFailed`."""
        self._closing = True
        if self._pool is not None:
            self._pool.close()

    def close(self) -> None:
        """End the servers that were started here."""
        if self.own is not None:
            self.own.close()

    def _admit(self, pool: ServerPool, loaded: Sequence[str], version: int) -> None:
        """Use the servers that pass the probe, and no others. A collective."""
        result = self._probe.run(pool, loaded, version)
        self._difference = result.difference
        good = [url for url in loaded if url not in result.wrong]
        for url in pool.urls:
            if url in good:
                pool.admit(url)
            else:
                pool.exclude(url, result.wrong.get(url, "it did not take the weights"))
        if self._groups.world.rank() == 0:
            for url, why in result.wrong.items():
                self._warn(f"rollout server {url} is left out: {why}")
            if self.own is not None:
                self.own.end(result.wrong)  # the next weights start it again
        if not good:
            reasons = [f"{url}: {why}" for url, why in result.wrong.items()]
            told = "; ".join(reasons) or "none took them"
            raise RunFailed(f"no rollout server has the weights of the trainer ({told})")

    def _new_pool(self, key: str | None) -> ServerPool:
        """The pool of all servers, the same on all ranks. A collective."""
        servers = self._servers
        return ServerPool(
            by_first(self._groups.world, lambda: self._urls(key)),
            in_flight=servers.in_flight,
            deadline_s=servers.deadline_s,
            retries=servers.retries,
            warn=self._warn,
            revive=self._revive,
            key=key,
        )

    def _urls(self, key: str | None) -> Sequence[str]:
        """On rank 0: the servers given, or those that are to be started."""
        if self.own is None:
            return self._servers.urls
        host = "127.0.0.1" if self._meeting is None else own_address(self._meeting)
        logs = self._config.run_dir / "servers"
        return self.own.create(self._servers.start, host, logs, key)

    def _key(self) -> str | None:
        """On rank 0, whose environment counts: the servers' key."""
        return new_key() if self._servers.start else given_key()

    def _revive(self) -> None:
        if self._groups.world.rank() == 0:
            self._delivery.revive(self.pool, self.sent)

    def _nobody_waits(self) -> bool:
        """Whether the run is to stop, or this is closed."""
        return self._closing or self._stop()
