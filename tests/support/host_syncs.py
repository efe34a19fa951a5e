"""Finds the places where a program makes the host wait for the device, on a machine without one.

On CUDA a read of a tensor's value (`item`, `tolist`, `bool(tensor)`), an operator whose result's
size depends on values (a boolean index, `nonzero`) and a copy from ordinary host memory (`tensor`
of numbers) wait until the device has come so far. All of them can be seen on a CPU: operators in a
TorchDispatchMode, and the calls that are no operators by standing in their place.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections import Counter
from pathlib import Path
from typing import Any, Callable
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).resolve().parents[2]
#: Operators that wait; with a boolean tensor among the indices, also those that index.
OPERATORS = {
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "unique_dim",
    "_unique2",
    "equal",
    "bincount",
    "repeat_interleave",
}
INDEXING = {"index", "index_put", "index_put_", "_unsafe_index"}
METHODS = ("cpu", "numpy", "tolist", "pin_memory")
FACTORIES = ("tensor", "as_tensor", "from_numpy")


class HostSyncs:
    """Within it, counts what waits, by the place in this package that asked for it.

    A place is "room/file.py: function". What Megatron itself does is not counted.
    """

    def __init__(self) -> None:
        self.places: Counter[str] = Counter()
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> HostSyncs:
        for owner, names in ((torch.Tensor, METHODS), (torch, FACTORIES)):
            for name in names:
                watched = self._watched(getattr(owner, name))
                self._stack.enter_context(mock.patch.object(owner, name, watched))
        self._stack.enter_context(_Operators(self._found))
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.close()

    def _watched(self, call: Callable) -> Callable:
        @functools.wraps(call)
        def watch(first: Any, *args: Any, **kwargs: Any) -> Any:
            moved = call.__name__ in FACTORIES and isinstance(first, torch.Tensor)
            if not moved:  # a tensor stays where it is
                self._found()
            return call(first, *args, **kwargs)

        return watch

    def _found(self) -> None:
        """Walk up to the first frame of this package or Megatron."""
        frame = sys._getframe(2)
        while frame is not None:
            file = frame.f_code.co_filename
            if "/megatron/" in file:
                return
            if file.startswith(str(ROOT / "megatron_rl")) and "megatron_on_cpu" not in file:
                path = Path(file).relative_to(ROOT / "megatron_rl")
                self.places[f"{path}: {frame.f_code.co_name}"] += 1
                return
            frame = frame.f_back


class _Operators(TorchDispatchMode):
    def __init__(self, found: Any) -> None:
        super().__init__()
        self._report = found

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # noqa: D105
        name = func.overloadpacket.__name__
        if name in OPERATORS or (name in INDEXING and any(map(_is_boolean, args[1]))):
            self._report()
        return func(*args, **(kwargs or {}))


def _is_boolean(index: Any) -> bool:
    return isinstance(index, torch.Tensor) and index.dtype == torch.bool
