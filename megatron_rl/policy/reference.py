"""The reference policy: a frozen copy of the weights in host memory, swapped in to score with
it.
"""

from __future__ import annotations

import contextlib
from typing import Iterator, Sequence

import torch


class ReferenceWeights:
    """A copy of this rank's weights and persistent buffers; the device holds one model at a time.

    The weights in use and the copy change places one tensor at a time, so that the swap needs
    device memory for one tensor only. It leaves the optimizer's main weights and moments alone. In
    fp32 the weights are their own main weights: at the end of `in_place` they are restored bit for
    bit.
    """

    def __init__(self, chunks: Sequence[torch.nn.Module]) -> None:
        self._chunks = tuple(chunks)
        self._kept: dict[str, torch.Tensor] = {}

    @torch.no_grad()
    def take(self) -> None:
        """Copy the current weights."""
        self._kept = {name: _host_copy(tensor) for name, tensor in self._live().items()}

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """A context in which the model has the reference weights. Its own return afterwards, also
        after an error.

        Raises:
            RuntimeError: `take` was not called.
        """
        if not self._kept:
            raise RuntimeError("the reference weights were never taken")
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, live in self._live().items():
            kept = self._kept[name]
            spare = live.clone()
            live.copy_(kept)
            kept.copy_(spare)

    def _live(self) -> dict[str, torch.Tensor]:
        """The tensors of the model by name, each storage once (tied weights have two names)."""
        found: dict[str, torch.Tensor] = {}
        seen: set[int] = set()
        for number, chunk in enumerate(self._chunks):
            for name, tensor in chunk.state_dict().items():
                if not isinstance(tensor, torch.Tensor) or name.endswith("_extra_state"):
                    continue  # state of Transformer Engine, not a weight
                if tensor.numel() and tensor.data_ptr() not in seen:
                    seen.add(tensor.data_ptr())
                    found[f"{number}.{name}"] = tensor
        return found


def _host_copy(tensor: torch.Tensor) -> torch.Tensor:
    kept = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
    return kept.copy_(tensor)
