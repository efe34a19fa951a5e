"""OLMoE: norms of queries and keys over all heads together."""

from __future__ import annotations

from typing import Any, Mapping

from megatron_rl.families.common.config_json import pre_softmax, read_experts
from megatron_rl.families.common.family import Family
from megatron_rl.families.common.file import HuggingFaceFile
from megatron_rl.families.common.keys import MoeKeys
from megatron_rl.families.common.weights import NORMS, OUTPUT, QK_NORM, experts, qkv


class OlmoeKeys(MoeKeys):
    norm_topk_prob: bool = False


def read(file: HuggingFaceFile, keys: OlmoeKeys) -> dict[str, Any]:
    return {
        **read_experts(keys),
        "router_pre_softmax": pre_softmax(keys.norm_topk_prob),
        "moe_ffn_hidden_size": keys.intermediate_size,
        "qk_norm": True,
        "qk_norm_scope": "layer",
    }


def write(model: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "num_experts": model["num_experts"],
        "num_experts_per_tok": model["moe_top_k"],
        "intermediate_size": model["moe_ffn_hidden_size"],
        "norm_topk_prob": not model["router_pre_softmax"],
    }


FAMILY = Family(
    model_type="olmoe",
    architecture="OlmoeForCausalLM",
    summary="query and key norms over all heads",
    source="arXiv 2409.02060",
    keys=OlmoeKeys,
    read=read,
    write=write,
    layer_weights={**NORMS, **OUTPUT, **qkv(), **QK_NORM, **experts()},
    meaningless={"use_qk_norm": (True,)},
)
