"""The reference policy: a frozen copy of the weights in host memory, swapped in for its pass."""

from __future__ import annotations

import contextlib
from typing import Iterator, Sequence

import torch


class ReferenceWeights:
    """A copy of this rank's weights and persistent buffers; the device holds one model at a time.

    The weights in use change place with the copy tensor by tensor, so that beside the copy only
    one tensor's worth of device memory is needed. Main weights and moments of the optimizer are
    not looked at; where the weights are their own main weights (fp32), these are back, bit for bit,
    at the end of `in_place`.
    """

    def __init__(self, chunks: Sequence[torch.nn.Module]) -> None:
        self._chunks = tuple(chunks)
        self._kept: dict[str, torch.Tensor] = {}

    @torch.no_grad()
    def take(self) -> None:
        """Keep the weights as they are now."""
        self._kept = {name: _host_copy(tensor) for name, tensor in self._live().items()}

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside, the model has the reference's weights; afterwards its own, even on an error.

        Raises:
            RuntimeError: nothing has been kept yet.
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
                    continue  # Transformer Engine's own; no weight
                if tensor.numel() and tensor.data_ptr() not in seen:
                    seen.add(tensor.data_ptr())
                    found[f"{number}.{name}"] = tensor
        return found


def _host_copy(tensor: torch.Tensor) -> torch.Tensor:
    kept = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
    return kept.copy_(tensor)
