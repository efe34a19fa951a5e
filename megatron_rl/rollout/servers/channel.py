"""A channel: how rank 0 of the trainer sends weights to the workers of one server."""

from __future__ import annotations

from concurrent.futures import TimeoutError as NotInTime
from typing import Any, Callable, Protocol, Sequence

import torch

from megatron_rl.rollout.servers.api import BadAnswer, Call

#: Makes a call to one server, and reads its response with the function.
Ask = Callable[[Call, Callable[[Any], Any]], Any]
#: Name, type and shape of a weight.
Entry = tuple[str, str, list[int]]
#: Waits until something begun is done. Raises one of ``FAILURES``.
Wait = Callable[[], None]

#: What may fail with one server, without harm to the others.
FAILURES = (BadAnswer, RuntimeError, OSError, TimeoutError, NotInTime)


class Channel(Protocol):
    """The steps of one update, in order. Each may raise one of ``FAILURES``."""

    def start(self, number: int) -> None:
        """Tell the workers that update ``number`` comes."""

    def reads(self) -> bool:
        """Whether all workers are ready to read."""

    def send(self, entries: Sequence[Entry], payload: torch.Tensor) -> Wait:
        """Begin to send some weights.

        Args:
            entries: names, types and shapes.
            payload: uint8 [bytes], the weights one after the other.
        """

    def end(self) -> Wait:
        """Begin to end the update; the wait is over when the workers have all weights."""
