"""The router trace: the experts that the old policy chose for each token, and their
log-probabilities.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Mapping

import torch

from megatron_rl.config.estimate import expert_id_bytes


@dataclass(frozen=True)
class LayerTrace:
    """One MoE layer's routing of the tokens this rank saw.

    Per token K ids in the smallest type that holds E experts and fp32 log-probabilities: fp32, so
    that the distance to an unchanged router is exactly zero. Of the N experts that the run's
    `DistanceRule` compares: the K, or all E.
    """

    expert_ids: torch.Tensor  #: uint8, int16 or int32 [T_local, K], ascending
    logprobs: torch.Tensor  #: fp32 [T_local, N]

    def pinned(self) -> LayerTrace:
        """The same in page-locked host memory; itself if it is on the CPU already."""
        return LayerTrace(_pinned(self.expert_ids), _pinned(self.logprobs))

    def to(self, device: torch.device) -> LayerTrace:
        """The same on the device; itself if it is on it already."""
        return LayerTrace(
            self.expert_ids.to(device, non_blocking=True),
            self.logprobs.to(device, non_blocking=True),
        )


#: Trace of one pack on one pipeline stage: global layer number (from 1) -> LayerTrace.
RouterTrace = Mapping[int, LayerTrace]


def on_device(trace: RouterTrace, device: torch.device) -> RouterTrace:
    """The trace on the device; what is on it already is not copied."""
    return {number: layer.to(device) for number, layer in trace.items()}


def id_dtype(num_experts: int) -> torch.dtype:
    """The smallest integer type that holds the ids 0..num_experts-1."""
    return {1: torch.uint8, 2: torch.int16, 4: torch.int32}[expert_id_bytes(num_experts)]


def _pinned(tensor: torch.Tensor) -> torch.Tensor:
    """A copy that the host does not wait for.

    This copy and the copy back run on the current stream, one after the other. The host must not
    read it in between.
    """
    if not tensor.is_cuda:
        return tensor
    kept = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=True)
    return kept.copy_(tensor, non_blocking=True)
