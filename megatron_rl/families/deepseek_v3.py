"""DeepSeek-V3: latent attention, and routing by sigmoid with a bias that only chooses."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Any, Mapping

from pydantic import Field

from megatron_rl.families.common.config_json import dense_layers, read_common
from megatron_rl.families.common.family import Family, Rule
from megatron_rl.families.common.file import HuggingFaceFile
from megatron_rl.families.common.keys import CommonKeys, Count, Positive, Size, Spelled
from megatron_rl.families.common.names import EXPERT_BIAS, SHARED_EXPERTS
from megatron_rl.families.common.weights import NORMS, OUTPUT, copies, experts, mlp


class DeepseekV3Keys(CommonKeys):
    head_dim: Size | None = None
    qk_head_dim: Size | None = None
    q_lora_rank: Size | None = None
    kv_lora_rank: Size
    qk_nope_head_dim: Size
    qk_rope_head_dim: Annotated[int, Field(ge=2, le=1 << 30)]
    v_head_dim: Size
    first_k_dense_replace: Count
    moe_layer_freq: Size = 1
    n_routed_experts: Annotated[Size, Spelled("n_routed_experts", "num_local_experts")]
    num_experts_per_tok: Size
    n_group: Size = 1
    topk_group: Size = 1
    moe_intermediate_size: Size
    n_shared_experts: Count = 0
    norm_topk_prob: bool = True
    routed_scaling_factor: Positive = 1.0


def read(file: HuggingFaceFile, keys: DeepseekV3Keys) -> dict[str, Any]:
    limited = keys.n_group > 1
    _refuse_others(file, keys)
    shared = keys.moe_intermediate_size * keys.n_shared_experts
    return {
        "num_query_groups": None,
        "kv_lora_rank": keys.kv_lora_rank,
        "q_lora_rank": keys.q_lora_rank,
        "qk_nope_head_dim": keys.qk_nope_head_dim,
        "qk_rope_head_dim": keys.qk_rope_head_dim,
        "v_head_dim": keys.v_head_dim,
        "qk_norm": True,
        "num_experts": keys.n_routed_experts,
        "moe_top_k": keys.num_experts_per_tok,
        "moe_ffn_hidden_size": keys.moe_intermediate_size,
        "moe_layer_freq": [
            int(i >= keys.first_k_dense_replace and i % keys.moe_layer_freq == 0)
            for i in range(keys.num_hidden_layers)
        ],
        "shared_expert_ffn_hidden_size": shared or None,
        "router_score": "sigmoid",
        "router_expert_bias": True,
        "router_num_groups": keys.n_group if limited else None,
        "router_group_top_k": keys.topk_group if limited else None,
        "router_scaling_factor": keys.routed_scaling_factor,
    }


def _refuse_others(file: HuggingFaceFile, keys: DeepseekV3Keys) -> None:
    if not keys.norm_topk_prob:
        raise file.refuse("norm_topk_prob false with sigmoid scores is not supported")
    if keys.n_group > 1 and keys.num_experts_per_tok // keys.topk_group != 2:
        # DeepSeek ranks groups by their two best experts, Megatron by their top_k // chosen best
        raise file.refuse(
            f"topk_group {keys.topk_group} with num_experts_per_tok {keys.num_experts_per_tok} is "
            "not supported (2 for each is)"
        )
    if keys.num_key_value_heads != keys.num_attention_heads:
        raise file.refuse("num_key_value_heads other than num_attention_heads is not supported")
    if keys.head_dim not in (None, keys.qk_rope_head_dim):
        raise file.refuse(
            f"head_dim={keys.head_dim} and qk_rope_head_dim={keys.qk_rope_head_dim} contradict"
        )
    whole = keys.qk_nope_head_dim + keys.qk_rope_head_dim
    if keys.qk_head_dim not in (None, whole):
        raise file.refuse(f"qk_head_dim {keys.qk_head_dim} is not the sum of its parts, {whole}")


def write(model: Mapping[str, Any]) -> dict[str, Any]:
    # "or": of models without latent attention, which are not of this family
    return {
        "head_dim": model["qk_rope_head_dim"],
        "kv_lora_rank": model["kv_lora_rank"] or 1,
        "q_lora_rank": model["q_lora_rank"],
        "qk_nope_head_dim": model["qk_nope_head_dim"] or 1,
        "qk_rope_head_dim": model["qk_rope_head_dim"] or 2,
        "v_head_dim": model["v_head_dim"] or 1,
        "rope_interleave": True,
        "first_k_dense_replace": len(dense_layers(model)),
        "n_routed_experts": model["num_experts"],
        "num_experts_per_tok": model["moe_top_k"],
        "moe_intermediate_size": model["moe_ffn_hidden_size"],
        "n_shared_experts": (model["shared_expert_ffn_hidden_size"] or 0)
        // model["moe_ffn_hidden_size"],
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "norm_topk_prob": True,
        "n_group": model["router_num_groups"] or 1,
        "topk_group": model["router_group_top_k"] or 1,
        "routed_scaling_factor": model["router_scaling_factor"] or 1.0,
        "num_nextn_predict_layers": 0,
        **_stretched(model),
    }


def _stretched(model: Mapping[str, Any]) -> dict[str, Any]:
    if model["yarn"] is None:
        return {}
    scaling = {"rope_type": "yarn", **model["yarn"]}
    return {
        "rope_scaling": scaling,
        "rope_parameters": {"rope_theta": model["rope_base"], **scaling},
    }


FAMILY = Family(
    model_type="deepseek_v3",
    architecture="DeepseekV3ForCausalLM",
    summary="latent attention, compressed queries or whole ones; sigmoid routing with bias, in "
    "groups or not; shared experts, YaRN. Moonlight is one. Multi-token prediction (layers beyond "
    "num_hidden_layers) is refused",
    source="arXiv 2412.19437",
    keys=DeepseekV3Keys,
    read=read,
    read_common=partial(read_common, yarn=True),
    write=write,
    layer_weights={
        **NORMS,
        **OUTPUT,
        **copies(
            linear_q_proj="q_proj",  # where queries are not compressed
            linear_q_down_proj="q_a_proj",
            q_layernorm="q_a_layernorm",
            linear_q_up_proj="q_b_proj",
            linear_kv_down_proj="kv_a_proj_with_mqa",
            kv_layernorm="kv_a_layernorm",
            linear_kv_up_proj="kv_b_proj",
        ),
        **mlp(),
        **experts(),
        EXPERT_BIAS: Rule("copy", ("mlp.gate.e_score_correction_bias",)),
        **mlp(SHARED_EXPERTS, "mlp.shared_experts"),
    },
    meaningless={
        "num_mtp_layers": (0, 1),  # as num_nextn_predict_layers: its tensors are refused
        "scoring_func": ("sigmoid",),
        "topk_method": ("noaux_tc",),
        "use_mla": (True,),
    },
)
