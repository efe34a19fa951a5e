"""Transformer Engine's layers with our parts: its attention behind the same placements as the local
one. Imported only where it is installed.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.extensions.transformer_engine import TEDotProductAttention
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_rl.config.schema import ModelConfig
from megatron_rl.models.attention import PackedPlacement, Placement
from megatron_rl.models.experts import GroupedExperts, moe_submodules
from megatron_rl.models.latent_attention import PackedLatentAttention
from megatron_rl.models.norm import KeyNorm, QueryNorm, norms_over_heads
from megatron_rl.models.router import PackRouter


class PlacedTEAttention(TEDotProductAttention):
    """Training packs go through Transformer Engine's variable-length kernels; decoding, and packs
    spread over context-parallel ranks, through the placement's own attention.
    """

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: Placement | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """[T, 1, heads, d] queries, [T, 1, groups, d] keys and values -> [T, 1, heads * d]."""
        query, key, value = (tensor.flatten(0, -3) for tensor in (query, key, value))
        placement = packed_seq_params
        assert placement is not None, "every pass has one"
        # Values of another width than keys (latent attention) are beyond some of the kernels.
        if type(placement) is not PackedPlacement or self.config.multi_latent_attention:
            scale = self.softmax_scale or query.shape[-1] ** -0.5
            output = placement.attend(self.layer_number, query, key, value, scale)
            return output.flatten(1).unsqueeze(1)
        varlen = PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=placement.cumulative_lengths,
            cu_seqlens_kv=placement.cumulative_lengths,
            max_seqlen_q=placement.longest,
            max_seqlen_kv=placement.longest,
        )
        output = super().forward(
            query,
            key,
            value,
            None,
            attn_mask_type or AttnMaskType.padding_causal,
            packed_seq_params=varlen,
            **kwargs,
        )
        return output.flatten(1).unsqueeze(1)


def with_our_parts(
    spec: TransformerBlockSubmodules, model: ModelConfig, config: TransformerConfig
) -> TransformerBlockSubmodules:
    """Put `PlacedTEAttention`, `PackRouter`, `GroupedExperts` (unless ``config.moe_grouped_gemm``
    asks for Transformer Engine's) and what else is ours into every layer of a Transformer Engine
    spec.
    """
    for layer in spec.layer_specs:
        attention = layer.submodules.self_attention
        attention.submodules.core_attention = PlacedTEAttention
        if model.kv_lora_rank:
            attention.module = PackedLatentAttention
        elif norms_over_heads(model):
            attention.submodules.q_layernorm = QueryNorm
            attention.submodules.k_layernorm = KeyNorm
        moe = moe_submodules(layer.submodules.mlp)
        if moe is not None:
            moe.router = PackRouter
            if not config.moe_grouped_gemm:
                moe.experts = ModuleSpec(module=GroupedExperts)
    return spec
