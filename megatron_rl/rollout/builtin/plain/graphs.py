"""Steps that are captured as CUDA graphs, and steps that are called."""

from __future__ import annotations

from typing import Any, Callable, Hashable

import torch


class Steps:
    """Calls every step."""

    def run(self, key: Hashable, step: Callable[[], None]) -> None:
        """Do a step. Steps of one key do the same on the same tensors."""
        step()

    def forget(self) -> None:
        """The tensors have moved."""


class CapturedSteps(Steps):
    """Calls the first step of a key, which also makes what libraries make once, captures the
    second, and replays from then on.
    """

    def __init__(self) -> None:
        self._called: set[Hashable] = set()
        self._graphs: dict[Hashable, torch.cuda.CUDAGraph] = {}
        self._pool: Any = None  # of memory, which the graphs share: they never run together

    def run(self, key: Hashable, step: Callable[[], None]) -> None:  # noqa: D102
        if key not in self._called:
            self._called.add(key)
            step()
            return
        if key not in self._graphs:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool):
                step()
            self._pool = self._pool or graph.pool()
            self._graphs[key] = graph
        self._graphs[key].replay()

    def forget(self) -> None:  # noqa: D102
        self._called.clear()
        self._graphs.clear()
        self._pool = None  # it went with its last graph
