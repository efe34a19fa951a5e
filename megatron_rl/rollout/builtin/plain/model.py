"""From a model's chunks to a `PlainModel`, made anew for each rollout: nothing in it is stale."""

from __future__ import annotations

from typing import Sequence

import torch
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

from megatron_rl.models.attention import PositionalRotaryEmbedding
from megatron_rl.models.gpt.chunk import Chunk
from megatron_rl.parallel.groups import Groups
from megatron_rl.rollout.builtin.plain.attention import Heads
from megatron_rl.rollout.builtin.plain.experts import Routing
from megatron_rl.rollout.builtin.plain.forward import PlainModel, angles_of
from megatron_rl.rollout.builtin.plain.gather import with_all_experts, with_own_share
from megatron_rl.rollout.builtin.plain.plan import Plan, shared_by_tensor_ranks
from megatron_rl.rollout.builtin.plain.rounding import Rounding, rounded
from megatron_rl.rollout.builtin.plain.transposed import transposed
from megatron_rl.rollout.builtin.plain.weights import ChunkWeights, chunk_weights


@torch.no_grad()
def plain_model(
    chunks: Sequence[Chunk],
    groups: Groups,
    plan: Plan,
    longest: int,
    rounding: Rounding = "none",
) -> PlainModel:
    """This rank's part of the model. A collective if the plan gathers experts.

    Args:
        chunks: bare.
        groups: process groups.
        plan: that says how.
        longest: tokens of a prompt and its answer together.
        rounding: of the weights, in copies of what this rank holds.
    """
    config = chunks[0].config
    dtype, device = config.params_dtype, next(chunks[0].parameters()).device
    weights = tuple(_weights(chunk, config, groups, plan, rounding) for chunk in chunks)
    if device.type == "cpu":
        weights = tuple(map(transposed, weights))
    rotary = next(m for m in chunks[0].modules() if isinstance(m, PositionalRotaryEmbedding))
    return PlainModel(
        chunks=weights,
        heads=_heads(chunks[0], groups),
        routing=Routing.of(config) if config.num_moe_experts else None,
        hidden_size=config.hidden_size,
        vocab_size=chunks[0].vocab_size - chunks[0].vocabulary_padding,
        dtype=dtype,
        fp32_head=chunks[-1].fp32_head,
        angles=angles_of(rotary, longest + 1, dtype, device),
        groups=groups,
    )


def _weights(
    chunk: Chunk, config: TransformerConfig, groups: Groups, plan: Plan, rounding: Rounding
) -> ChunkWeights:
    experts = config.num_moe_experts
    if not experts:
        return rounded(chunk_weights(chunk, 0), rounding)
    first = experts // groups.expert.size() * groups.expert.rank()
    weights = rounded(chunk_weights(chunk, first), rounding)
    if plan.gathers:
        weights = with_all_experts(weights, groups)
    elif groups.expert.size() * groups.expert_tensor.size() > 1:
        assert shared_by_tensor_ranks(groups), "the plan has looked"
        return weights
    return with_own_share(weights, groups.tensor)


def _heads(chunk: Chunk, groups: Groups) -> Heads:
    config = chunk.config
    if isinstance(config, MLATransformerConfig):
        attention = next(m for m in chunk.modules() if isinstance(m, MLASelfAttention))
        return Heads(
            width=config.qk_head_dim + config.qk_pos_emb_head_dim,
            rotated=config.qk_pos_emb_head_dim,
            value=config.v_head_dim,
            latent=config.kv_lora_rank,
            absorbed=config.params_dtype != torch.float32,
            scale=attention.softmax_scale,
            epsilon=config.layernorm_epsilon,
            tensor=groups.tensor,
        )
    width = config.kv_channels
    return Heads(
        width=width,
        rotated=width,
        value=width,
        latent=0,
        absorbed=False,
        scale=width**-0.5,
        epsilon=config.layernorm_epsilon,
        tensor=groups.tensor,
    )
