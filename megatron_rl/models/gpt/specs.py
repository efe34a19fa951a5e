"""Layer specs: Megatron's layers with our norm, attention and experts, or with Transformer
Engine's linear layers and norms.
"""

from __future__ import annotations

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from megatron.core.transformer.multi_latent_attention import MLASelfAttentionSubmodules
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

from megatron_rl.config.layout import moe_layers
from megatron_rl.config.schema import ModelConfig
from megatron_rl.models.attention import PackedAttention
from megatron_rl.models.experts import GroupedExperts
from megatron_rl.models.latent_attention import PackedLatentAttention
from megatron_rl.models.norm import KeyNorm, QueryNorm, RMSNorm, norms_over_heads
from megatron_rl.models.router import PackRouter


def block_spec(
    model: ModelConfig, config: TransformerConfig, transformer_engine: bool, vp_stage: int | None
) -> TransformerBlockSubmodules:
    """The layers of this pipeline stage (and virtual stage)."""
    if transformer_engine:
        # Imported only where it is installed.
        from megatron_rl.models.gpt.transformer_engine import with_our_parts

        spec = get_gpt_decoder_block_spec(config, use_transformer_engine=True, vp_stage=vp_stage)
        return with_our_parts(spec, model, config)
    first = get_transformer_layer_offset(config, vp_stage=vp_stage)
    count = get_num_layers_to_build(config, vp_stage=vp_stage)
    marks = moe_layers(model)[first : first + count]
    layers = [_local_layer_spec(model, is_moe) for is_moe in marks]
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=RMSNorm)


def _local_layer_spec(model: ModelConfig, moe: bool) -> ModuleSpec:
    """One transformer layer that needs neither Transformer Engine nor Apex.

    Transformer Engine fuses norms into the linear layers that follow; its key names are the
    checkpoint's.
    """
    attention, fused = _latent_attention(model) if model.kv_lora_rank else _attention(model)
    if not moe:
        fused = {**fused, "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_"}
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=RMSNorm,
            self_attention=attention,
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=RMSNorm,
            mlp=_moe_spec() if moe else _dense_spec(),
            mlp_bda=get_bias_dropout_add,
            sharded_state_dict_keys_map=fused,
        ),
    )


def _attention(model: ModelConfig) -> tuple[ModuleSpec, dict[str, str]]:
    """Grouped-query attention, and the keys of norms that Transformer Engine fuses."""
    query_norm, key_norm = IdentityOp, IdentityOp
    if model.qk_norm:
        query_norm, key_norm = RMSNorm, RMSNorm
    if norms_over_heads(model):
        query_norm, key_norm = QueryNorm, KeyNorm
    spec = ModuleSpec(
        module=SelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=ColumnParallelLinear,
            core_attention=PackedAttention,
            linear_proj=RowParallelLinear,
            q_layernorm=query_norm,
            k_layernorm=key_norm,
        ),
    )
    return spec, {"input_layernorm.": "self_attention.linear_qkv.layer_norm_"}


def _latent_attention(model: ModelConfig) -> tuple[ModuleSpec, dict[str, str]]:
    """As `_attention`, multi-head latent."""
    spec = ModuleSpec(
        module=PackedLatentAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=MLASelfAttentionSubmodules(
            linear_q_proj=ColumnParallelLinear,
            linear_q_down_proj=ColumnParallelLinear,
            linear_q_up_proj=ColumnParallelLinear,
            linear_kv_down_proj=ColumnParallelLinear,
            linear_kv_up_proj=ColumnParallelLinear,
            core_attention=PackedAttention,
            linear_proj=RowParallelLinear,
            q_layernorm=RMSNorm if model.q_lora_rank else IdentityOp,
            kv_layernorm=RMSNorm,
        ),
    )
    return spec, {
        f"self_attention.{x}_layernorm.": f"self_attention.linear_{x}_up_proj.layer_norm_"
        for x in ("q", "kv")
    }


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
