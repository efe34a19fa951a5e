"""Seconds of each phase of a step, and peak memory."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from megatron_rl.observe.metric_table import metric

_BYTES_PER_GIB = 2**30


class Timers:
    """Wall-clock seconds by phase, added up until ``reset``.

    ``with timers("rollout"): ...`` adds to ``time/rollout_s``. A phase that raises is counted as
    well.
    """

    def __init__(self, synchronize: Callable[[], None] | None = None) -> None:
        """synchronize: called before each reading, so that work queued on a GPU falls into its
        own phase."""
        self._synchronize = synchronize
        self._seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Time the block. ValueError: the metric table has no ``time/<phase>_s``."""
        name = f"time/{phase}_s"
        metric(name)
        start = self._now()
        try:
            yield
        finally:
            self._seconds[name] = self._seconds.get(name, 0.0) + self._now() - start

    def seconds(self) -> dict[str, float]:
        """Metric name -> seconds since the last reset; only phases that were entered."""
        return dict(self._seconds)

    def forget(self, phase: str) -> None:
        """Leave out a phase that was given up."""
        self._seconds.pop(f"time/{phase}_s", None)

    def reset(self) -> None:
        """Forget all phases; called at the start of a step."""
        self._seconds.clear()

    def _now(self) -> float:
        if self._synchronize is not None:
            self._synchronize()
        return time.perf_counter()


def peak_memory_gib(device_kind: str) -> float:
    """Most memory this process has held so far, GiB.

    "cuda": peak of the allocator on the current device; "cpu": peak resident set. ValueError:
    another kind.
    """
    if device_kind == "cuda":
        import torch

        return torch.cuda.max_memory_allocated() / _BYTES_PER_GIB
    if device_kind != "cpu":
        raise ValueError(f"device kind {device_kind!r}; expected 'cpu' or 'cuda'")
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    bytes_per_unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux KiB
    return peak * bytes_per_unit / _BYTES_PER_GIB
