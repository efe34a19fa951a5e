"""Mixtral."""

from __future__ import annotations

from functools import partial
from typing import Any, Mapping

from megatron_rl.families.common.config_json import read_common, read_experts
from megatron_rl.families.common.family import Family
from megatron_rl.families.common.file import HuggingFaceFile
from megatron_rl.families.common.keys import MoeKeys
from megatron_rl.families.common.weights import NORMS, OUTPUT, experts, qkv


def read(file: HuggingFaceFile, keys: MoeKeys) -> dict[str, Any]:
    return {
        **read_experts(keys),
        "moe_ffn_hidden_size": keys.intermediate_size,
        "router_pre_softmax": False,  # Mixtral always renormalises the K weights
        "qk_norm": False,
    }


def write(model: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "num_local_experts": model["num_experts"],
        "num_experts_per_tok": model["moe_top_k"],
        "intermediate_size": model["moe_ffn_hidden_size"],
    }


FAMILY = Family(
    model_type="mixtral",
    architecture="MixtralForCausalLM",
    summary="every layer of experts",
    source="arXiv 2401.04088",
    keys=MoeKeys,
    read=read,
    read_common=partial(read_common, window_switch=False),
    write=write,
    layer_weights={
        **NORMS,
        **OUTPUT,
        **qkv(),
        **experts("block_sparse_moe", names=("w1", "w3", "w2")),
    },
    meaningless={"norm_topk_prob": (True,)},
)
