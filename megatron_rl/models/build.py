"""From the configuration to this rank's chunks of the model."""

from __future__ import annotations

import importlib.util
import itertools
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.transformer_config import (
    MLATransformerConfig,
    TransformerConfig,
)

from megatron_rl.config.layout import heads_of
from megatron_rl.config.schema import Config, ModelConfig, ParallelConfig, YarnConfig
from megatron_rl.device.select import Device
from megatron_rl.errors import UserError
from megatron_rl.models.experts import has_grouped_kernel
from megatron_rl.models.gpt.chunk import Chunk, make_chunk, routers_of
from megatron_rl.models.initial import initialise
from megatron_rl.models.parameters import parameter_views
from megatron_rl.parallel.groups import Groups

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def uses_transformer_engine(model: ModelConfig, device: Device) -> bool:
    """Transformer Engine layers: on CUDA, where it is installed, unless the configuration says
    otherwise.
    """
    used = _has_transformer_engine(model, device.kind)
    if model.transformer_engine and not used:
        raise UserError(
            "model.transformer_engine is true, but Transformer Engine is not installed or the "
            "device is not CUDA; "
            "install megatron_rl[te] on a CUDA machine or leave the key out"
        )
    if model.kv_lora_rank and device.kind == "cuda" and not used:
        raise UserError(
            "found latent attention (model.kv_lora_rank) on CUDA without Transformer Engine; "
            "expected it, because Megatron-Core 0.16 builds no such layer without it; install "
            "megatron_rl[te], or leave model.transformer_engine out"
        )
    return used


def _has_transformer_engine(model: ModelConfig, kind: str) -> bool:
    installed = importlib.util.find_spec("transformer_engine") is not None
    return installed and kind == "cuda" and model.transformer_engine is not False


def shares_prompts(config: Config, device: torch.device) -> bool:
    """Whether sequences share their prompts; see ``data.share_prompts``. UserError: the attention
    of this device cannot do it.
    """
    able = not _has_transformer_engine(config.model, device.type)
    if config.data.share_prompts == "on" and not able:
        raise UserError(
            "found data.share_prompts on with Transformer Engine's attention, which cannot do it; "
            "expected auto or off; set it to auto, or model.transformer_engine to false"
        )
    return able and config.data.share_prompts != "off"


def _leave(weight: torch.Tensor) -> torch.Tensor:
    return weight


def transformer_config(
    model: ModelConfig, parallel: ParallelConfig, device: Device, *, routing_replay: bool = False
) -> TransformerConfig:
    """Megatron's configuration of the same model. ``routing_replay``: see `router.replay`."""
    dtype = DTYPES[model.dtype]
    on_cuda_with_te = uses_transformer_engine(model, device)
    recompute_by_name: dict[str, dict[str, Any]] = {
        "none": {},
        "selective": {"recompute_granularity": "selective"},
        "full": {
            "recompute_granularity": "full",
            "recompute_method": "uniform",
            "recompute_num_layers": 1,
        },
    }
    recompute = recompute_by_name[parallel.recompute]
    heads, groups, width = heads_of(model)
    kind = MLATransformerConfig if model.kv_lora_rank else TransformerConfig
    return kind(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        num_attention_heads=heads,
        num_query_groups=groups,
        kv_channels=width,
        ffn_hidden_size=model.ffn_hidden_size,
        normalization="RMSNorm",
        layernorm_epsilon=model.norm_epsilon,
        qk_layernorm=model.qk_norm,
        add_bias_linear=False,
        add_qkv_bias=model.qkv_bias,
        gated_linear_unit=True,
        activation_func=F.silu,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        # `initialise` draws the weights, alike under every layout.
        init_method=_leave,
        output_layer_init_method=_leave,
        embedding_init_method=_leave,
        masked_softmax_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        apply_rope_fusion=False,
        gradient_accumulation_fusion=False,
        persist_layer_norm=False,
        use_cpu_initialization=device.kind == "cpu",
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        calculate_per_token_loss=True,
        # Transformer Engine's experts: a product each, twice as long as torch's one kernel.
        moe_grouped_gemm=on_cuda_with_te and not has_grouped_kernel(device.torch_device),
        moe_enable_routing_replay=routing_replay,
        transformer_impl="transformer_engine" if on_cuda_with_te else "local",
        **_latent_fields(model),
        **_moe_fields(model, parallel),
        **_parallel_fields(parallel),
        **recompute,
    )


def _latent_fields(model: ModelConfig) -> dict[str, object]:
    if not model.kv_lora_rank:
        return {}
    return dict(
        q_lora_rank=model.q_lora_rank,
        kv_lora_rank=model.kv_lora_rank,
        qk_head_dim=model.qk_nope_head_dim,
        qk_pos_emb_head_dim=model.qk_rope_head_dim,
        v_head_dim=model.v_head_dim,
        rotary_base=model.rope_base,
        **_yarn_fields(model.yarn),
    )


def _yarn_fields(yarn: YarnConfig | None) -> dict[str, object]:
    if yarn is None:
        return {"rope_type": "rope", "rotary_scaling_factor": 1.0}
    return {"rope_type": "yarn", "rotary_scaling_factor": yarn.factor} | yarn.model_dump(
        exclude={"factor"}
    )


def _moe_fields(model: ModelConfig, parallel: ParallelConfig) -> dict[str, object]:
    if not model.num_experts:
        return {}
    return dict(
        num_moe_experts=model.num_experts,
        moe_router_topk=model.moe_top_k,
        moe_ffn_hidden_size=model.moe_ffn_hidden_size,
        moe_layer_freq=model.moe_layer_freq,
        moe_shared_expert_intermediate_size=model.shared_expert_ffn_hidden_size,
        moe_shared_expert_gate=model.shared_expert_gate,
        moe_router_score_function=model.router_score,
        moe_router_pre_softmax=model.router_pre_softmax,
        moe_router_enable_expert_bias=model.router_expert_bias,
        moe_router_bias_update_rate=model.expert_bias_update_rate,
        moe_router_num_groups=model.router_num_groups,
        moe_router_group_topk=model.router_group_top_k,
        moe_router_topk_scaling_factor=model.router_scaling_factor,
        moe_router_dtype="fp32",
        moe_router_load_balancing_type="aux_loss" if model.aux_loss_coeff else "none",
        moe_aux_loss_coeff=model.aux_loss_coeff,
        moe_z_loss_coeff=model.z_loss_coeff or None,
        moe_token_dispatcher_type=parallel.dispatcher,
    )


def _parallel_fields(parallel: ParallelConfig) -> dict[str, object]:
    interleaved = parallel.virtual_pipeline is not None
    return dict(
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline,
        context_parallel_size=parallel.context,
        expert_model_parallel_size=parallel.expert,
        expert_tensor_parallel_size=parallel.expert_tensor,
        sequence_parallel=parallel.tensor > 1,
        # With batched point-to-point calls the interleaved schedule silently mixes up tensors on
        # gloo.
        overlap_p2p_comm=interleaved,
        batch_p2p_comm=not interleaved,
    )


def build_chunks(
    model: ModelConfig, config: TransformerConfig, groups: Groups, device: Device, seed: int | None
) -> list[Chunk]:
    """This rank's chunks of the model (one; with interleaving one per virtual stage), initialised
    from the seed; None: the matrices hold anything, because they are to be loaded.
    """
    # Embeddings fork Megatron's random states under sequence parallelism, dropout or not.
    model_parallel_cuda_manual_seed(seed or 0, force_reset_rng=True)
    stages = range(groups.virtual_stages) if groups.virtual_stages else [None]
    with_te = uses_transformer_engine(model, device)
    chunks = [
        make_chunk(model, config, groups, stage, transformer_engine=with_te).to(device.torch_device)
        for stage in stages
    ]
    if seed is not None:
        initialise(parameter_views(chunks, groups), seed, model.init_std, model.num_layers)
    if model.freeze_router:
        for router in itertools.chain.from_iterable(map(dict.values, routers_of(chunks))):
            router.requires_grad_(False)
    return chunks
