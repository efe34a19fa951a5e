"""Qwen3-MoE."""

from __future__ import annotations

from typing import Any, Mapping

from megatron_rl.families.common.config_json import dense_layers, pre_softmax, read_experts
from megatron_rl.families.common.family import Family
from megatron_rl.families.common.file import HuggingFaceFile
from megatron_rl.families.common.keys import MoeKeys, Size
from megatron_rl.families.common.weights import DENSE, QK_NORM, experts


class Qwen3MoeKeys(MoeKeys):
    norm_topk_prob: bool = False
    moe_intermediate_size: Size
    decoder_sparse_step: Size = 1
    mlp_only_layers: list[int] = []


def read(file: HuggingFaceFile, keys: Qwen3MoeKeys) -> dict[str, Any]:
    return {
        **read_experts(keys),
        "router_pre_softmax": pre_softmax(keys.norm_topk_prob),
        "moe_ffn_hidden_size": keys.moe_intermediate_size,
        "moe_layer_freq": _moe_layers(keys),
        "qk_norm": True,
    }


def _moe_layers(keys: Qwen3MoeKeys) -> int | list[int]:
    """Layer i is MoE if decoder_sparse_step divides i + 1 and mlp_only_layers lacks i."""
    step, dense = keys.decoder_sparse_step, set(keys.mlp_only_layers)
    marks = [int((i + 1) % step == 0 and i not in dense) for i in range(keys.num_hidden_layers)]
    return 1 if all(marks) else marks


def write(model: Mapping[str, Any]) -> dict[str, Any]:
    return {
        # transformers 4 reads num_experts, 5 writes num_local_experts
        "num_experts": model["num_experts"],
        "num_local_experts": model["num_experts"],
        "num_experts_per_tok": model["moe_top_k"],
        "moe_intermediate_size": model["moe_ffn_hidden_size"],
        "norm_topk_prob": not model["router_pre_softmax"],
        "decoder_sparse_step": 1,
        "mlp_only_layers": dense_layers(model),
        "use_sliding_window": False,
    }


FAMILY = Family(
    model_type="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    summary="also tied embeddings, norm_topk_prob false, mlp_only_layers",
    source="arXiv 2505.09388",
    keys=Qwen3MoeKeys,
    read=read,
    write=write,
    layer_weights={**DENSE, **QK_NORM, **experts()},
    meaningless={"use_qk_norm": (True,)},
)
