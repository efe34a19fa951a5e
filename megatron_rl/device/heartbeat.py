"""Heartbeats of the ranks: a stopped or stuck rank is named within a minute.

A rank that is stopped, swapped out or on a frozen machine keeps its connections. The others would
wait in their next collective until ``device.timeout_s`` without knowing for which rank. So a thread
of each rank posts a counter to the rendezvous store over its own connection (with gloo and NCCL).
Rank 0 watches all ranks; the first rank of each node watches the ranks of its node and rank 0; rank
1 watches rank 0. They warn on stderr and end nothing: a stopped rank may be resumed, and otherwise
the collective ends the run.

The first rank of a node also touches a file while no rank of its node is silent, for a liveness
probe. The file shows that the processes live. It does not show progress: a step may take hours, and
ranks that wait in vain end by ``device.timeout_s``.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Callable, Sequence

from torch.distributed import PrefixStore, Store, TCPStore

from megatron_rl.device.launch import Launch, join_address
from megatron_rl.device.silence import ENDED, STORE, Silences
from megatron_rl.errors import UserError

#: Signs within the silence limit: several, because a machine may be busy.
SIGNS_IN_LIMIT = 9
#: Longest wait for the threads at the end, seconds: one may wait for a frozen machine.
PATIENCE_S = 5.0


class Heartbeat:
    """Gives signs of life and watches those of others, in threads that end with the block.

    One thread talks to the store and may wait for its answer without end; the other watches the
    first and touches the file.
    """

    def __init__(
        self,
        launch: Launch,
        limit_s: float,
        timeout_s: float,
        file: Path | None = None,
        warn: Callable[[str], None] | None = None,
    ) -> None:
        """
        Args:
            launch: with the rendezvous address.
            limit_s: silence after which a rank is named, seconds.
            timeout_s: wait after which a collective ends the run, seconds; for the message.
            file: the first rank of a node touches it; None: no file.
            warn: shows a line; None: on stderr.
        """
        self._launch, self._limit_s, self._timeout_s = launch, limit_s, timeout_s
        self._file = file if launch.local_rank == 0 else None
        self._show = warn or _warn
        self._pause_s = limit_s / SIGNS_IN_LIMIT
        self._store: Store | None = None
        self._round = 0  #: that the store has answered
        self._ranks, self._of_store = (
            Silences(parties, limit_s, self._pause_s, time.monotonic())
            for parties in (watched(launch), [STORE])
        )
        self._stop, self._clean = threading.Event(), False
        meets = launch.master is not None and launch.world_size > 1
        loops = [self._ask] if meets else []
        if self._file is not None or (meets and watched(launch)):
            loops.append(self._watch)
        self._threads = [threading.Thread(target=loop, daemon=True) for loop in loops]

    def __enter__(self) -> Heartbeat:
        """
        Raises:
            UserError: the file cannot be written.
        """
        if self._file is not None:
            _first_touch(self._file)
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._clean = error is None  # a failed rank falls silent: others may still wait for it
        self._stop.set()
        for thread in self._threads:
            thread.join(PATIENCE_S)

    def _ask(self) -> None:
        """Give signs and read those of the others."""
        with contextlib.suppress(
            RuntimeError
        ):  # torch's error: the store is gone, and the run will end
            self._store = self._connect()
            while True:
                silent, again = self._ranks.look(time.monotonic(), self._signs(self._store))
                self._round += 1
                self._tell(silent, again)
                if self._stop.wait(self._pause_s):
                    break
            if self._clean:
                self._store.set(str(self._launch.rank), ENDED)

    def _watch(self) -> None:
        """Check that the store answers, and touch the file."""
        asks = len(self._threads) > 1
        while not self._stop.wait(self._pause_s):
            if asks:
                self._tell(*self._of_store.look(time.monotonic(), {STORE: str(self._round)}))
            if self._file is not None and not self._ranks.any_silent(_of_node(self._launch)):
                with contextlib.suppress(OSError):
                    self._file.touch()

    def _signs(self, store: Store) -> dict[int, str | None]:
        """Give a sign, and read those of the others; None: a rank has given none yet."""
        sign = f"{self._round} {socket.gethostname()} {os.getpid()}"
        store.set(str(self._launch.rank), sign)
        ranks = watched(self._launch)
        there = [r for r in ranks if self._ranks.sign(r) or store.check([str(r)])]
        return dict.fromkeys(ranks) | dict(zip(there, _read(store, there)))

    def _tell(self, silent: Sequence[int], again: Sequence[int]) -> None:
        if silent:
            self._show(self._of_silent(silent))
        if again:
            names = ("the machine of rank 0" if p == STORE else f"rank {p}" for p in again)
            self._show(f"{', '.join(names)} answers now")

    def _connect(self) -> Store:
        assert self._launch.master is not None, "a sign needs the rendezvous address"
        host, port = self._launch.master
        timeout = timedelta(seconds=self._timeout_s)
        store = TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timeout)
        return PrefixStore("megatron_rl/heartbeat", store)

    def _of_silent(self, parties: Sequence[int]) -> str:
        ends = f"the run ends once a collective has waited {self._timeout_s:g} s (device.timeout_s)"
        if STORE in parties:
            assert self._launch.master is not None, (
                "watching the store needs the rendezvous address"
            )
            place = join_address(*self._launch.master)
            return (
                f"no answer from {place}, where the ranks meet, for {self._limit_s:g} s; "
                f"expected the machine of rank 0; it is stopped or cannot be reached; {ends}"
            )
        names = [_name(party, self._ranks.sign(party)) for party in parties]
        verb = "has" if len(parties) == 1 else "have"
        if all(self._ranks.sign(party) is None for party in parties):
            what = f"{verb} not joined the run for {self._limit_s:g} s"
        else:
            what = f"{verb} given no sign of life for {self._limit_s:g} s"
        return (
            f"{', '.join(names[:8])}{f' and {len(names) - 8} more' if len(names) > 8 else ''} "
            f"{what}; expected one every {self._pause_s:g} s; stopped (kill -CONT resumes it), "
            f"starved or gone; {ends}"
        )


def watched(launch: Launch) -> list[int]:
    """The ranks that a rank watches; if there are any, it watches the store as well."""
    ranks: set[int] = set()
    if launch.rank == 0:
        ranks = set(range(launch.world_size))
    elif launch.local_rank == 0:
        ranks = {0, *_of_node(launch)}
    elif launch.rank == 1:
        ranks = {0}
    return sorted(ranks - {launch.rank})


def _of_node(launch: Launch) -> range:
    """The ranks of this rank's node: torchrun numbers them one after the other."""
    first = launch.rank - launch.local_rank
    return range(first, first + launch.local_world_size)


def _read(store: Store, ranks: Sequence[int]) -> list[str]:
    return [sign.decode() for sign in store.multi_get([str(r) for r in ranks])] if ranks else []


def _name(rank: int, sign: str | None) -> str:
    if sign is None:
        return f"rank {rank}"
    _, host, process = sign.split()
    return f"rank {rank} (process {process} on {host})"


def _first_touch(file: Path) -> None:
    try:
        file.touch()
    except OSError as error:
        raise UserError(
            f"device.heartbeat_file {file} cannot be written ({error.strerror}); expected a file "
            "in a directory of this machine"
        ) from error


def _warn(line: str) -> None:
    with contextlib.suppress(OSError, ValueError):  # stderr is full or closed
        print(f"megatron-rl: warning: {line}", file=sys.stderr, flush=True)
