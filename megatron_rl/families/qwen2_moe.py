"""Qwen2-MoE: as Qwen3-MoE, with biases instead of norms, and a shared expert with a gate."""

from __future__ import annotations

from typing import Any, Mapping

from megatron_rl.families import qwen3_moe
from megatron_rl.families.common.family import Family, Rule
from megatron_rl.families.common.file import HuggingFaceFile
from megatron_rl.families.common.keys import Count
from megatron_rl.families.common.weights import DENSE, experts, mlp, qkv


class Qwen2MoeKeys(qwen3_moe.Qwen3MoeKeys):
    qkv_bias: bool = True
    shared_expert_intermediate_size: Count


def read(file: HuggingFaceFile, keys: Qwen2MoeKeys) -> dict[str, Any]:
    return {
        **qwen3_moe.read(file, keys),
        "qk_norm": False,
        "qkv_bias": keys.qkv_bias,
        # an expert of width 0 adds 0 with any gate
        "shared_expert_ffn_hidden_size": keys.shared_expert_intermediate_size or None,
        "shared_expert_gate": keys.shared_expert_intermediate_size > 0,
    }


def write(model: Mapping[str, Any]) -> dict[str, Any]:
    return {
        **qwen3_moe.write(model),
        "qkv_bias": model["qkv_bias"],
        "shared_expert_intermediate_size": model["shared_expert_ffn_hidden_size"] or 0,
    }


FAMILY = Family(
    model_type="qwen2_moe",
    architecture="Qwen2MoeForCausalLM",
    summary="gated shared expert, biases of queries, keys and values",
    source="arXiv 2407.10671",
    keys=Qwen2MoeKeys,
    read=read,
    write=write,
    layer_weights={
        **DENSE,
        **qkv("bias"),
        **experts(),
        **mlp("mlp.shared_experts", "mlp.shared_expert"),
        "mlp.shared_experts.gate_weight": Rule("copy", ("mlp.shared_expert_gate.weight",)),
    },
)
