"""The names of a model's weights, without building it."""

from __future__ import annotations

from megatron_rl.config.layout import moe_layers
from megatron_rl.config.schema import ModelConfig


def layer_weights(model: ModelConfig) -> list[str]:
    """Names within a layer, as in `models.parameters`, of every weight that some layer has;
    ``{expert}`` stands for an expert's number.
    """
    marks = moe_layers(model)
    return [
        "input_layernorm.weight",
        *(f"self_attention.{name}" for name in _attention(model)),
        "pre_mlp_layernorm.weight",
        *(_swiglu("mlp") if not all(marks) else ()),
        *(_experts(model) if any(marks) else ()),
    ]


def _attention(model: ModelConfig) -> list[str]:
    if not model.kv_lora_rank:
        norms = ["q_layernorm.weight", "k_layernorm.weight"] * model.qk_norm
        biases = ["linear_qkv.bias"] * model.qkv_bias
        return ["linear_qkv.weight", *biases, *norms, "linear_proj.weight"]
    queries = ["linear_q_proj"]
    if model.q_lora_rank:
        queries = ["linear_q_down_proj", "q_layernorm", "linear_q_up_proj"]
    keys = ["linear_kv_down_proj", "kv_layernorm", "linear_kv_up_proj"]
    return [f"{name}.weight" for name in (*queries, *keys, "linear_proj")]


def _experts(model: ModelConfig) -> list[str]:
    shared = _swiglu("mlp.shared_experts") if model.shared_expert_ffn_hidden_size else []
    return [
        "mlp.router.weight",
        *["mlp.router.expert_bias"] * model.router_expert_bias,
        *_swiglu("mlp.experts.{expert}"),
        *shared,
        *["mlp.shared_experts.gate_weight"] * model.shared_expert_gate,
    ]


def _swiglu(block: str) -> list[str]:
    return [f"{block}.linear_fc1.weight", f"{block}.linear_fc2.weight"]
