"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1) of packed sequences."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.common.embeddings import RotaryEmbedding, YarnRotaryEmbedding
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_rl.models.attention import PositionalRotaryEmbedding


class PackedLatentAttention(MLASelfAttention):
    """Megatron's layer, with the positions that the placement gives."""

    rotary_pos_emb: RotaryEmbedding

    def __init__(self, config: TransformerConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        self.rotary_pos_emb = _LatentRotaryEmbedding(config, self.rotary_pos_emb)
        for name in ("linear_q_down_proj", "linear_kv_down_proj"):
            if isinstance(getattr(self, name, None), ColumnParallelLinear):
                setattr(self, name, _WholeLinear(config, *_sizes(config, name)))

    def _resolve_qk_norm_config(self, submodules: Any) -> dict[str, Any]:
        """What the spec says. Megatron 0.19 asks here, and by itself would normalise the input of
        queries that are not compressed, which DeepSeek does not.
        """
        names = ("linear_q_proj", "linear_q_up_proj", "linear_kv_up_proj")
        norms = ("q_layernorm", "kv_layernorm")
        return {name: getattr(submodules, name) for name in (*names, *norms)}


class _LatentRotaryEmbedding(PositionalRotaryEmbedding):
    """As Megatron's own of the layer, at the positions that the placement gives."""

    inv_freq: torch.Tensor

    def __init__(self, config: TransformerConfig, megatrons: RotaryEmbedding) -> None:
        super().__init__(
            kv_channels=config.qk_pos_emb_head_dim,
            rotary_percent=1.0,
            rotary_base=config.rotary_base,
            use_cpu_initialization=config.use_cpu_initialization,
        )
        self._factor = None  # YaRN's, on sines and cosines
        if isinstance(megatrons, YarnRotaryEmbedding):
            angles, self._factor = megatrons.get_emb(2)
            self.inv_freq = angles[1, 0, 0, : len(self.inv_freq)]  # those of position 1

    def forward(self, positions: torch.Tensor, *_: Any, **__: Any) -> Any:
        """int64 [T] -> angles fp32 [T, 1, rotary_dim]: packed, latent attention has no batch axis.

        With YaRN also its factor.
        """
        angles = super().forward(positions).squeeze(1)
        return angles if self._factor is None else (angles, self._factor)


class _WholeLinear(MegatronModule):
    """A projection that every tensor-parallel rank holds whole and applies to its own tokens.

    Transformer Engine has the same ("duplicated"). Megatron's local spec splits the columns and
    gathers them, and then misses the other ranks' gradients of the rotated part of the keys.
    """

    def __init__(self, config: TransformerConfig, inputs: int, outputs: int) -> None:
        super().__init__(config)
        self.weight = torch.nn.Parameter(torch.empty(outputs, inputs, dtype=config.params_dtype))
        weight: Any = self.weight  # Megatron's marks are attributes
        weight.sequence_parallel = config.sequence_parallel

    def forward(self, tokens: torch.Tensor) -> tuple[torch.Tensor, None]:
        """[..., inputs] -> [..., outputs], and no bias."""
        return F.linear(tokens, self.weight), None


def _sizes(config: TransformerConfig, name: str) -> tuple[int, int]:
    if name == "linear_q_down_proj":
        return config.hidden_size, config.q_lora_rank
    return config.hidden_size, config.kv_lora_rank + config.qk_pos_emb_head_dim
