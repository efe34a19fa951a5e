"""Whether a model and a layout can be decoded by the plain functions, and if not, why.

The functions compute what Megatron's modules compute for the options that are named here. Any other
option has to have its default, any weight has to be one that they use, and any module of one of the
classes that they stand for; otherwise the engine goes through the modules.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Collection, Mapping, Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.distributed import ProcessGroup

from megatron_rl.models.gpt.chunk import Chunk
from megatron_rl.models.router import count_tokens
from megatron_rl.parallel.collectives import gather_objects
from megatron_rl.parallel.groups import Groups
from megatron_rl.rollout.builtin.plain.weights import UnknownWeight, chunk_weights

#: Options of Megatron's that `forward`, `attention` and `experts` read, or that are in the weights.
COMPUTED = frozenset(
    {
        "num_layers", "hidden_size", "num_attention_heads", "num_query_groups", "kv_channels",
        "ffn_hidden_size", "layernorm_epsilon", "qk_layernorm", "add_qkv_bias", "params_dtype",
        "pipeline_dtype", "bf16", "num_moe_experts", "moe_layer_freq", "moe_ffn_hidden_size",
        "moe_router_topk", "moe_router_score_function", "moe_router_pre_softmax",
        "moe_router_enable_expert_bias", "moe_router_num_groups", "moe_router_group_topk",
        "moe_router_topk_scaling_factor", "moe_shared_expert_intermediate_size",
        "moe_shared_expert_gate", "multi_latent_attention", "q_lora_rank", "kv_lora_rank",
        "qk_head_dim", "qk_pos_emb_head_dim", "v_head_dim", "rope_type", "rotary_base",
        "rotary_scaling_factor", "original_max_position_embeddings", "beta_fast", "beta_slow",
        "mscale", "mscale_all_dim", "tensor_model_parallel_size", "pipeline_model_parallel_size",
        "virtual_pipeline_model_parallel_size", "context_parallel_size",
        "expert_model_parallel_size", "expert_tensor_parallel_size", "sequence_parallel",
    }
)  # fmt: skip
#: Options that change nothing in a forward pass of a model in evaluation mode: those of training
#: (dropout, losses, initial values, recomputation, gradients), of schedules and of fused kernels.
WITHOUT_EFFECT = frozenset(
    {
        "use_cpu_initialization", "perform_initialization", "init_method", "init_method_std",
        "output_layer_init_method", "embedding_init_method", "embedding_init_method_std",
        "hidden_dropout", "attention_dropout", "calculate_per_token_loss", "autocast_dtype",
        "microbatch_group_size_per_vp_stage", "overlap_p2p_comm", "batch_p2p_comm",
        "recompute_granularity", "recompute_method", "recompute_num_layers", "recompute_modules",
        "moe_aux_loss_coeff", "moe_z_loss_coeff", "moe_router_bias_update_rate",
        "moe_enable_routing_replay", "moe_token_dispatcher_type", "moe_grouped_gemm",
        "transformer_impl", "cuda_graph_scope", "cuda_graph_modules", "timers",
        "inference_cuda_graph_scope", "inference_grouped_gemm_backend",
        "moe_flex_dispatcher_num_sms", "moe_flex_dispatcher_backend",
        "finalize_model_grads_func", "grad_scale_func", "no_sync_func", "grad_sync_func",
        "param_sync_func", "num_microbatches_with_partial_activation_checkpoints",
        "gradient_accumulation_fusion", "bias_activation_fusion", "masked_softmax_fusion",
        "persist_layer_norm", "bias_dropout_fusion", "apply_rope_fusion", "variable_seq_lengths",
        "deterministic_mode",
    }
)  # fmt: skip
#: The values that the functions need of others.
NEEDED: Mapping[str, Collection[Any]] = {
    "normalization": ("RMSNorm",),
    "gated_linear_unit": (True,),
    "add_bias_linear": (False,),
    "activation_func": (F.silu,),
    "moe_router_load_balancing_type": ("none", "aux_loss"),
    "moe_router_dtype": ("fp32", None),
}
#: The options of section ``model``: all that there are, since each was looked at.
MODEL_OPTIONS = frozenset(
    {
        "preset", "hf_path", "hf_config", "family", "num_layers", "hidden_size",
        "num_attention_heads", "num_query_groups", "head_dim", "ffn_hidden_size", "num_experts",
        "moe_top_k", "moe_ffn_hidden_size", "moe_layer_freq", "shared_expert_ffn_hidden_size",
        "shared_expert_gate", "router_score", "router_pre_softmax", "router_expert_bias",
        "router_num_groups", "router_group_top_k", "router_scaling_factor", "aux_loss_coeff",
        "z_loss_coeff", "expert_bias_update_rate", "freeze_router", "vocab_size",
        "max_sequence_length", "rope_base", "yarn", "qk_norm", "qk_norm_scope", "kv_lora_rank",
        "q_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "qkv_bias",
        "norm_epsilon", "tie_embeddings", "init_std", "dtype", "transformer_engine", "fp32_head",
    }
)  # fmt: skip
#: Classes of ours in a model whose forward pass the functions stand for.
MODULES = frozenset(
    {
        "PackedAttention", "PositionalRotaryEmbedding", "PackedLatentAttention",
        "_LatentRotaryEmbedding", "_WholeLinear", "GroupedExperts", "_ExpertWeight", "PackRouter",
        "RMSNorm", "QueryNorm", "KeyNorm", "PlacedTEAttention", "HeadApart", "RotarySelfAttention",
        "PackMoELayer", "GatedMLP", "GatedSharedExperts",
    }
)  # fmt: skip
#: Hooks of ours that change nothing here: shared prompts' tokens count in training only.
HOOKS = (count_tokens,)


@dataclass(frozen=True)
class Plan:
    """How a rank decodes."""

    reason: str | None  #: why through Megatron's modules; None: by the plain functions
    gathers: bool = False  #: each rank first gets copies of all experts

    @property
    def is_plain(self) -> bool:
        """Whether by the plain functions."""
        return self.reason is None

    def text(self) -> str:
        """For the run summary; empty if there is nothing to say."""
        if self.reason is not None:
            return f"through Megatron's modules: {self.reason}"
        return "by each rank alone, with copies of all experts" if self.gathers else ""


def plan_of(
    config: TransformerConfig,
    groups: Groups,
    device: torch.device,
    spare: float,
    chunks: Sequence[Chunk] = (),
) -> Plan:
    """What the options, the layout and the modules allow. A collective of all ranks.

    Args:
        config: of the model.
        groups: process groups.
        device: of the weights.
        spare: bytes that this rank can spare for copies of experts.
        chunks: this rank's of the model, bare; none: they are not looked at.
    """
    reason = unknown_option(config) or unknown_module(chunks) or unknown_weight(chunks)
    reasons = [found for found in gather_objects(reason, groups.world) if found is not None]
    if reasons:
        return Plan(reasons[0])
    split = groups.expert.size() * groups.expert_tensor.size() > 1
    if not config.num_moe_experts or not split or shared_by_tensor_ranks(groups):
        return Plan(None)
    if device.type != "cpu":
        return Plan("experts are split over ranks with other prompts, on CUDA")
    missing = torch.tensor(float(missing_bytes(config, groups) > spare))
    dist.all_reduce(missing, op=dist.ReduceOp.MAX, group=groups.world)
    if missing:
        return Plan("all experts do not fit a rank's memory")
    return Plan(None, gathers=True)


def unknown_option(config: TransformerConfig) -> str | None:
    """The first option with a value that the functions do not know; None: there is none."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name in COMPUTED or field.name in WITHOUT_EFFECT:
            continue
        if field.name in NEEDED:
            known = value in NEEDED[field.name]
        else:
            known = bool(value == _default(field))
        if not known:
            return f"they alone know {field.name} {value!r}"
    return None


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def unknown_module(chunks: Sequence[torch.nn.Module]) -> str | None:
    """The first module of a class of ours, or with a hook, that the functions do not know."""
    for chunk in chunks:
        for name, module in chunk.named_modules():
            kind = type(module)
            if kind.__module__.startswith("megatron_rl.") and kind.__name__ not in MODULES:
                return f"they alone know a {kind.__name__}"
            hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
            if any(hook not in HOOKS for hook in hooks):
                return f"a hook watches {name or 'the model'}"
    return None


def unknown_weight(chunks: Sequence[Chunk]) -> str | None:
    """The first weight that the functions do not use, or lack."""
    try:
        for chunk in chunks:
            chunk_weights(chunk, 0)
    except UnknownWeight as error:
        return str(error)
    return None


def shared_by_tensor_ranks(groups: Groups) -> bool:
    """Whether the tensor-parallel ranks, which have the same tokens, together hold each part of
    each expert once.
    """
    ranks = set(dist.get_process_group_ranks(groups.tensor))
    inside = _within(groups.expert, ranks) and _within(groups.expert_tensor, ranks)
    return inside and groups.expert.size() * groups.expert_tensor.size() == len(ranks)


def _within(group: ProcessGroup, ranks: set[int]) -> bool:
    return set(dist.get_process_group_ranks(group)) <= ranks


def missing_bytes(config: TransformerConfig, groups: Groups) -> float:
    """Bytes of copies of all experts of a pipeline stage, as many MoE layers as it may have."""
    assert config.num_moe_experts is not None and config.moe_ffn_hidden_size is not None
    matrix = config.hidden_size * config.moe_ffn_hidden_size * config.params_dtype.itemsize
    layers = -(-config.num_layers // groups.pipeline_stages)
    return 3.0 * matrix * config.num_moe_experts * layers
