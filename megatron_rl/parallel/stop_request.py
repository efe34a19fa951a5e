"""Stopping cleanly: a signal asks, and the ranks agree to stop where no work is lost."""

from __future__ import annotations

import itertools
import signal
import time
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from megatron_rl.parallel.collectives import all_max

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


#: Seconds between two checks whether another rank was asked.
LOOK_EVERY_S = 1.0
#: Numbers the requests of a process: each has its own key in the store, the same on all ranks.
_MADE = itertools.count()


class StopRequest:
    """Remembers that a signal came; a second SIGINT interrupts at once. A context manager; every
    rank must enter the same number of them.
    """

    def __init__(self) -> None:
        self.requested = False
        self._key = f"megatron_rl/stop_{next(_MADE)}"
        self._told = False  #: the other ranks, or by one of them
        self._looked = 0.0
        self._previous: dict[int, Any] = {}  #: handlers, as `signal.signal` gives and takes them

    def __enter__(self) -> StopRequest:
        for number in SIGNALS:
            self._previous[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, *exc_info: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True

    def heard(self) -> bool:
        """Whether this rank or another was asked to stop. Ranks tell each other through the
        rendezvous store, without a collective, so they hear it at different times.
        """
        if self._told:
            return True
        store = dist.distributed_c10d._get_default_store()
        if self.requested:
            store.set(self._key, "1")
            self._told = True
        elif time.monotonic() - self._looked >= LOOK_EVERY_S:
            self._told = self.requested = store.check([self._key])
            self._looked = time.monotonic()
        return self._told

    def agreed(self, world: ProcessGroup, device: torch.device) -> bool:
        """True on every rank as soon as one rank was asked to stop. A collective."""
        return bool(all_max(int(self.requested), world, device))
