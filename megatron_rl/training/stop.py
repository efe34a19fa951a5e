"""Stopping cleanly: a signal asks, the ranks agree between two steps."""

from __future__ import annotations

import signal
from types import FrameType

import torch
from torch.distributed import ProcessGroup

from megatron_rl.parallel.collectives import all_max

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopRequest:
    """Remembers that a signal came; a second SIGINT interrupts at once. A context manager."""

    def __init__(self) -> None:
        self.requested = False
        self._previous: dict[int, object] = {}

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

    def agreed(self, world: ProcessGroup, device: torch.device) -> bool:
        """True on every rank as soon as one rank was asked to stop. A collective."""
        return bool(all_max(int(self.requested), world, device))
