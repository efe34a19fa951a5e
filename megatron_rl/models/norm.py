"""RMSNorm for models without Transformer Engine."""

from __future__ import annotations

import torch
from megatron.core.transformer.transformer_config import TransformerConfig


class RMSNorm(torch.nn.RMSNorm):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, usable under sequence
    parallelism.

    Megatron's own local norm refuses sequence parallelism because it does not mark its weight;
    Megatron sums the gradients of weights marked ``sequence_parallel`` over the tensor-parallel
    group.
    """

    def __init__(
        self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: object
    ) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel
