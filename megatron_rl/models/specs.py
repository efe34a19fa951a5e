"""Layer specs: Megatron's layers with our norm, attention and experts, or with Transformer
Engine's.
"""

from __future__ import annotations

import functools
from typing import Any

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
    get_transformer_layer_offset,
)

from megatron_rl.models.attention import PackedAttention
from megatron_rl.models.experts import GroupedExperts
from megatron_rl.models.norm import RMSNorm
from megatron_rl.models.router import PackRouter


def moe_pattern(config: TransformerConfig) -> list[bool]:
    """For each layer of the whole model, from the first: is it a MoE layer?"""
    if isinstance(config.moe_layer_freq, int):
        return [layer % config.moe_layer_freq == 0 for layer in range(config.num_layers)]
    return [bool(flag) for flag in config.moe_layer_freq]


def block_spec(
    config: TransformerConfig, transformer_engine: bool, vp_stage: int | None
) -> TransformerBlockSubmodules:
    """The layers of this pipeline stage (and virtual stage)."""
    if transformer_engine:
        from megatron_rl.models.transformer_engine import with_layout_attention

        spec = get_gpt_decoder_block_spec(config, use_transformer_engine=True, vp_stage=vp_stage)
        return with_layout_attention(spec)
    first = get_transformer_layer_offset(config, vp_stage=vp_stage)
    count = get_num_layers_to_build(config, vp_stage=vp_stage)
    layers = [local_layer_spec(config, moe) for moe in moe_pattern(config)[first : first + count]]
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=RMSNorm)


def moe_submodules(mlp: Any) -> MoESubmodules | None:
    """The parts of a MoE layer that stands in a Megatron spec; None of a dense one.

    A spec holds the layer as a ModuleSpec (0.16) or a functools.partial (0.19).
    """
    holder = mlp.keywords if isinstance(mlp, functools.partial) else vars(mlp)
    found = holder.get("submodules")
    return found if isinstance(found, MoESubmodules) else None


def local_layer_spec(config: TransformerConfig, moe: bool) -> ModuleSpec:
    """One transformer layer that needs neither Transformer Engine nor Apex."""
    qk_norm = RMSNorm if config.qk_layernorm else IdentityOp
    attention = ModuleSpec(
        module=SelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=ColumnParallelLinear,
            core_attention=PackedAttention,
            linear_proj=RowParallelLinear,
            q_layernorm=qk_norm,
            k_layernorm=qk_norm,
        ),
    )
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=RMSNorm,
            self_attention=attention,
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=RMSNorm,
            mlp=_moe_spec() if moe else _dense_spec(),
            mlp_bda=get_bias_dropout_add,
            # Transformer Engine fuses these norms into the linear layers; its key names are the
            # checkpoint's.
            sharded_state_dict_keys_map={
                "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
                **({} if moe else {"pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_"}),
            },
        ),
    )


def _mlp_submodules() -> MLPSubmodules:
    return MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)


def _dense_spec() -> ModuleSpec:
    return ModuleSpec(module=MLP, submodules=_mlp_submodules())


def _moe_spec() -> ModuleSpec:
    return ModuleSpec(
        module=MoELayer,
        submodules=MoESubmodules(
            router=PackRouter,
            experts=ModuleSpec(module=GroupedExperts),
            shared_experts=ModuleSpec(module=SharedExpertMLP, submodules=_mlp_submodules()),
        ),
        metainfo={"fuse_pre_mlp_layernorm": False},
    )
