"""The router trace: which experts the old policy chose for each token, and with which
log-probability.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Mapping

import torch


@dataclass(frozen=True)
class LayerTrace:
    """One MoE layer's routing of the tokens this rank saw.

    Per token K ids in the smallest type that holds E experts and K fp32 log-probabilities: fp32, so
    that the distance to an unchanged router is exactly zero.
    """

    expert_ids: torch.Tensor  #: uint8, int16 or int32 [T_local, K], ascending
    logprobs: torch.Tensor  #: fp32 [T_local, K]


#: Trace of one pack on one pipeline stage: global layer number (from 1) -> LayerTrace.
RouterTrace = Mapping[int, LayerTrace]


def id_dtype(num_experts: int) -> torch.dtype:
    """The smallest integer type that holds the ids 0..num_experts-1."""
    if num_experts <= 1 << 8:
        return torch.uint8
    return torch.int16 if num_experts <= 1 << 15 else torch.int32


def trace_bytes_per_token(num_moe_layers: int, top_k: int, num_experts: int) -> int:
    """Bytes a token takes in the traces of all layers together."""
    return num_moe_layers * top_k * (id_dtype(num_experts).itemsize + 4)
