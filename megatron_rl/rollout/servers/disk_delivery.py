"""Weights to the servers by a directory that they read."""

from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Callable, Sequence

import torch

from megatron_rl.config.schema import Config
from megatron_rl.errors import one_line
from megatron_rl.parallel.collective_try import by_first
from megatron_rl.parallel.groups import Groups
from megatron_rl.rollout.servers.api import BadAnswer, ServerApi
from megatron_rl.rollout.servers.own_servers import OwnServers
from megatron_rl.rollout.servers.pool import ServerPool
from megatron_rl.weights.export import describe, stream_weights
from megatron_rl.weights.writer import write_hf_directory

#: Versions of the weights that stay on the disk: the one in use, from which a server may still be
#: started, and the one that replaces it.
KEPT_VERSIONS = 2


class DiskDelivery:
    """`sync.WeightDelivery` by Hugging Face directories ``version_N``; starts a run's own servers.

    Every rank writes its share. Rank 0 tells the servers to read, and deletes old directories.
    """

    def __init__(
        self,
        config: Config,
        api: ServerApi,
        chunks: Sequence[torch.nn.Module],
        groups: Groups,
        own: OwnServers | None,
        warn: Callable[[str], None],
    ) -> None:
        """own: servers that this run starts; None: all servers run already. warn: shows a line."""
        self._api, self._chunks, self._groups = api, chunks, groups
        self._own, self._warn = own, warn
        self._model = config.model
        self._family, self._config_json = describe(config.model, config.model.hf_path)
        self._root = config.rollout.servers.weights_dir or config.run_dir / "servers" / "weights"
        self._pauses = config.rollout.lag > 1  # answers may be under way during an update
        self._is_first = True

    def prepare(self, version: int) -> None:
        """Write the weights. A collective."""
        if self._is_first and self._groups.world.rank() == 0:
            self._delete(self._versions())  # of this run, before it was interrupted
        self._is_first = False
        write_hf_directory(
            self._directory(version),
            stream_weights(self._chunks, self._groups, self._model, self._family),
            self._config_json,
            self._groups.world,
            like=self._model.hf_path,
            replace=True,
        )

    def deliver(self, pool: ServerPool, version: int) -> list[str]:
        """Have the servers read the weights. A collective.

        Returns:
            The urls of the servers that say that they have them.
        """
        return by_first(self._groups.world, lambda: self._load(pool, version))

    def revive(self, pool: ServerPool, version: int) -> None:
        """Start this run's servers again with these weights, if some have ended. On rank 0."""
        if self._own is None or self._own.all_run:
            return
        for url in self._own.start_ended(self._directory(version)):
            if self._load_one(pool, url, version, is_new=True) is None:
                pool.admit(url)

    def _load(self, pool: ServerPool, version: int) -> list[str]:
        new: set[str] = set()
        urls = pool.urls
        if self._own is not None:
            new = self._own.start_ended(self._directory(version))
            starting = self._own.starting()
            urls = [url for url in urls if url not in starting]
        with ThreadPoolExecutor(max(1, len(urls))) as threads:
            failures = list(
                threads.map(lambda url: self._load_one(pool, url, version, url in new), urls)
            )
        for url, failure in zip(urls, failures):
            if failure is not None:
                self._warn(f"rollout server {url} did not take the weights: {failure}")
        self._delete(self._versions()[:-KEPT_VERSIONS])
        return [url for url, failure in zip(urls, failures) if failure is None]

    def _load_one(self, pool: ServerPool, url: str, version: int, is_new: bool) -> str | None:
        """Have a server read the weights; why it did not, or None. is_new: it has started with
        them.
        """
        calls = self._api.load_calls(str(self._directory(version).absolute()), str(version))
        if is_new:
            calls = calls[-1:]
        elif self._pauses:
            calls = [*self._api.pause_calls(), *calls, *self._api.resume_calls()]
        try:
            for call in calls:
                pool.send(url, call)
        except BadAnswer as error:
            return one_line(error)
        return None

    def _directory(self, version: int) -> Path:
        return self._root / f"version_{version}"

    def _versions(self) -> list[Path]:
        """All weights on the disk, the oldest first."""
        found = self._root.glob("version_*")
        own = [path for path in found if path.name.removeprefix("version_").isdecimal()]
        return sorted(own, key=lambda path: int(path.name.removeprefix("version_")))

    def _delete(self, directories: Sequence[Path]) -> None:
        """Delete directories, except those that a server reads while it starts."""
        needed = set() if self._own is None else set(self._own.starting().values())
        for directory in directories:
            if directory not in needed:
                shutil.rmtree(directory, ignore_errors=True)
