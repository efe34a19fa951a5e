"""The inverse of ``hf_config.py``: a Hugging Face config.json that describes a ``ModelConfig``."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Callable, Mapping

from megatron_rl.config.hf_config import fields_of_values, read_hf_config
from megatron_rl.config.layout import heads_of, moe_layers
from megatron_rl.config.schema import ModelConfig
from megatron_rl.errors import UserError

#: model_type -> the class of transformers that loads it.
ARCHITECTURES: Mapping[str, str] = {
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "qwen2_moe": "Qwen2MoeForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "olmoe": "OlmoeForCausalLM",
    "deepseek_v3": "DeepseekV3ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}

#: Fields a config.json says nothing of: where the architecture came from, and how it is trained.
_NOT_DESCRIBED = {
    "preset",
    "hf_config",
    "hf_path",
    "aux_loss_coeff",
    "z_loss_coeff",
    "expert_bias_update_rate",
    "freeze_router",
    "init_std",
    "transformer_engine",
}


def hf_config_of(model: ModelConfig) -> dict[str, Any]:
    """The config.json of the first family that describes the model exactly.

    What it says is read back with ``read_hf_config``'s rules and compared field by field, so a
    model no family describes (group-limited routing, a qk-norm on Mixtral...) cannot be exported as
    something else.

    Raises:
        UserError: no family does; naming what the nearest one cannot say.
    """
    wanted = _described(model)
    misses: dict[str, list[str]] = {}
    for model_type, describe in _FAMILIES.items():
        values = {**_common(model), "model_type": model_type, **describe(model)}
        values["architectures"] = [ARCHITECTURES[model_type]]
        said = _described(ModelConfig(**fields_of_values(values)))
        misses[model_type] = [n for n in wanted if wanted[n] != said.get(n)]
        if not misses[model_type]:
            return values
    nearest = min(misses, key=lambda name: len(misses[name]))
    field = misses[nearest][0]
    raise UserError(
        f"no Hugging Face family describes this model; the nearest, {nearest}, has no "
        f"model.{field} {wanted[field]}; expected a model of {', '.join(_FAMILIES)}; change it "
        "before training, or keep it as a Megatron checkpoint"
    )


def check_describes(directory: Path, model: ModelConfig) -> None:
    """Refuse a model directory whose config.json describes another architecture than the model's.

    Its number type and longest sequence may differ. Raises UserError naming the fields.
    """
    wanted, said = _described(model), _described(ModelConfig(**read_hf_config(directory)))
    free = ("dtype", "max_sequence_length")
    differing = [n for n in wanted if n not in free and wanted[n] != said.get(n)]
    if differing:
        found = ", ".join(f"{name} {said.get(name)}" for name in differing)
        expected = ", ".join(f"{name} {wanted[name]}" for name in differing)
        raise UserError(
            f"{directory}/config.json describes a model with {found}; the weights are of one with "
            f"{expected}; name the model directory the training started from, or none"
        )


def _described(model: ModelConfig) -> dict[str, Any]:
    """The fields that a config.json describes, defaults filled in."""
    fields = model.model_dump(exclude=_NOT_DESCRIBED)
    _, fields["num_query_groups"], fields["head_dim"] = heads_of(model)
    fields["moe_layer_freq"] = [int(mark) for mark in moe_layers(model)]
    if all(moe_layers(model)):
        del fields["ffn_hidden_size"]  # of dense layers, which there are none
    if not model.num_experts:
        fields = {n: v for n, v in fields.items() if not n.startswith(_OF_EXPERTS)}
    if not model.qk_norm or model.kv_lora_rank:
        del fields["qk_norm_scope"]
    if model.router_score == "sigmoid":
        fields["router_scaling_factor"] = model.router_scaling_factor or 1.0
    return fields


#: Fields without a meaning in a dense model.
_OF_EXPERTS = ("moe_", "router_", "shared_expert_")


def _common(model: ModelConfig) -> dict[str, Any]:
    return {
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.num_query_groups or model.num_attention_heads,
        "head_dim": model.head_dim or model.hidden_size // model.num_attention_heads,
        "hidden_act": "silu",
        "max_position_embeddings": model.max_sequence_length,
        "rms_norm_eps": model.norm_epsilon,
        # both spellings: transformers 4 reads the first, 5 the second
        "rope_theta": model.rope_base,
        "rope_parameters": {"rope_type": "default", "rope_theta": model.rope_base},
        "tie_word_embeddings": model.tie_embeddings,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "torch_dtype": {"fp32": "float32", "bf16": "bfloat16"}[model.dtype],
        "use_cache": True,
    }


def _qwen3_moe(model: ModelConfig) -> dict[str, Any]:
    dense = [layer for layer, moe in enumerate(moe_layers(model)) if not moe]
    return {
        # transformers 4 reads num_experts, 5 writes num_local_experts
        "num_experts": model.num_experts,
        "num_local_experts": model.num_experts,
        "num_experts_per_tok": model.moe_top_k,
        "moe_intermediate_size": model.moe_ffn_hidden_size,
        "norm_topk_prob": not model.router_pre_softmax,
        "decoder_sparse_step": 1,
        "mlp_only_layers": dense,
        "use_sliding_window": False,
    }


def _qwen2_moe(model: ModelConfig) -> dict[str, Any]:
    return {
        **_qwen3_moe(model),
        "qkv_bias": model.qkv_bias,
        "shared_expert_intermediate_size": model.shared_expert_ffn_hidden_size or 0,
    }


def _mixtral(model: ModelConfig) -> dict[str, Any]:
    return {
        "num_local_experts": model.num_experts,
        "num_experts_per_tok": model.moe_top_k,
        "intermediate_size": model.moe_ffn_hidden_size,
    }


def _qwen3(model: ModelConfig) -> dict[str, Any]:
    return {"use_sliding_window": False}


def _deepseek_v3(model: ModelConfig) -> dict[str, Any]:
    dense = [layer for layer, moe in enumerate(moe_layers(model)) if not moe]
    return {
        "head_dim": model.qk_rope_head_dim,
        "kv_lora_rank": model.kv_lora_rank or 1,
        "q_lora_rank": model.q_lora_rank,
        "qk_nope_head_dim": model.qk_nope_head_dim or 1,
        "qk_rope_head_dim": model.qk_rope_head_dim or 2,
        "v_head_dim": model.v_head_dim or 1,
        "rope_interleave": True,
        "first_k_dense_replace": len(dense),
        "n_routed_experts": model.num_experts,
        "num_experts_per_tok": model.moe_top_k,
        "moe_intermediate_size": model.moe_ffn_hidden_size,
        "n_shared_experts": (model.shared_expert_ffn_hidden_size or 0) // model.moe_ffn_hidden_size,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "norm_topk_prob": True,
        "n_group": model.router_num_groups or 1,
        "topk_group": model.router_group_top_k or 1,
        "routed_scaling_factor": model.router_scaling_factor or 1.0,
        "num_nextn_predict_layers": 0,
        **_stretched(model),
    }


def _stretched(model: ModelConfig) -> dict[str, Any]:
    if model.yarn is None:
        return {}
    scaling = {"rope_type": "yarn", **model.yarn.model_dump()}
    return {
        "rope_scaling": scaling,
        "rope_parameters": {"rope_theta": model.rope_base, **scaling},
    }


def _olmoe(model: ModelConfig) -> dict[str, Any]:
    return {
        "num_experts": model.num_experts,
        "num_experts_per_tok": model.moe_top_k,
        "intermediate_size": model.moe_ffn_hidden_size,
        "norm_topk_prob": not model.router_pre_softmax,
    }


_FAMILIES: Mapping[str, Callable[[ModelConfig], dict[str, Any]]] = {
    "qwen3": _qwen3,  # the dense one first: the others can say that there are no experts
    "qwen3_moe": _qwen3_moe,
    "mixtral": _mixtral,
    "olmoe": _olmoe,
    "qwen2_moe": _qwen2_moe,
    "deepseek_v3": _deepseek_v3,
}
