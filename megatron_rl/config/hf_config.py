"""Map a Hugging Face config.json to ``ModelConfig`` fields; refuse what is not implemented.

Reads the spellings of transformers 4 (``rope_theta``, ``num_experts``, ``torch_dtype``) and 5
(``rope_parameters``, ``num_local_experts``, ``dtype``). A wrong architecture still loads and saves
every weight bit for bit, so a key neither mapped nor known to be harmless is an error. Types and
bounds are those of ``hf_file.py``: nothing is worked out of a value before it is known to be one.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Callable, Mapping

from pydantic import ValidationError

from megatron_rl.catalogue.nearest import did_you_mean
from megatron_rl.config.hf_file import (
    KEYS,
    MODEL_TYPES,
    SPELLINGS,
    CommonKeys,
    DeepseekV3Keys,
    HuggingFaceFile,
    MoeKeys,
    OlmoeKeys,
    Qwen2MoeKeys,
    Qwen3Keys,
    Qwen3MoeKeys,
    given,
    is_neutral,
    shown,
)
from megatron_rl.config.hf_rope import rope_fields
from megatron_rl.config.json_text import read_json_object

_DTYPES = {"float32": "fp32", "bfloat16": "bf16"}


def read_hf_config(path: Path) -> dict[str, Any]:
    """The ``ModelConfig`` fields that a config.json (or the directory that holds it) determines.

    ``max_sequence_length`` is set to ``max_position_embeddings``; balancing losses are not taken.
    Raises UserError for a file that cannot be read, an unknown model_type, a missing key, a value
    of another type or out of bounds, and any key whose meaning is not implemented (rope scaling,
    sliding windows, clip_qkv, quantization, biases but Qwen2's).
    """
    return _fields(_open(path))


def fields_of_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """As ``read_hf_config``, of the content of a config.json."""
    return _fields(HuggingFaceFile(Path("config.json"), given(values)))


def read_model_type(path: Path) -> str:
    """The family that a config.json (or the directory that holds it) names. UserError: another."""
    return _known_type(_open(path))


def _open(path: Path) -> HuggingFaceFile:
    file = path / "config.json" if os.path.isdir(path) else path
    return HuggingFaceFile(file, given(read_json_object(file, "a Hugging Face config.json")))


def _known_type(file: HuggingFaceFile) -> str:
    model_type = file.values.get("model_type")
    if not isinstance(model_type, str) or model_type not in MODEL_TYPES:
        hint = did_you_mean(str(model_type), MODEL_TYPES) if isinstance(model_type, str) else ""
        raise file.refuse(f"model_type {shown(model_type)} is not supported{hint}")
    return model_type


def _fields(file: HuggingFaceFile) -> dict[str, Any]:
    model_type = _known_type(file)
    keys = _typed(file, KEYS[model_type])
    fields = {**_common(file, keys, model_type), **_FAMILIES[model_type](file, keys)}
    _refuse_the_rest(file, keys, model_type)
    return fields


def _typed(file: HuggingFaceFile, kind: type[CommonKeys]) -> CommonKeys:
    """The values as the family's keys; refuses the first of a wrong type or out of bounds."""
    values = dict(file.values)
    for name, spellings in SPELLINGS.items():
        if name not in kind.model_fields:
            continue
        found = {key: values.pop(key) for key in spellings if key in values}
        first = next(iter(found.values()), None)
        if any(value != first for value in found.values()):
            said = " and ".join(f"{key}={shown(value)}" for key, value in found.items())
            raise file.refuse(f"{said} contradict")
        values |= {} if first is None else {name: first}
    for name in ("rope_parameters", "rope_scaling"):
        if isinstance(values.get(name), dict):
            values[name] = given(values[name])
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        wrong = error.errors()[0]
        name = ".".join(map(str, wrong["loc"]))
        if wrong["type"] == "missing":
            raise file.refuse(f"{' or '.join(SPELLINGS.get(name, (name,)))} is missing") from error
        raise file.refuse(
            f"{name} is {shown(wrong['input'])} ({wrong['msg'].replace('Input', 'it', 1)})"
        ) from error


def _common(file: HuggingFaceFile, keys: CommonKeys, model_type: str) -> dict[str, Any]:
    """What all families spell alike."""
    fields = {
        "num_layers": keys.num_hidden_layers,
        "hidden_size": keys.hidden_size,
        "num_attention_heads": keys.num_attention_heads,
        "num_query_groups": keys.num_key_value_heads,
        "ffn_hidden_size": keys.intermediate_size,
        "vocab_size": keys.vocab_size,
        "max_sequence_length": keys.max_position_embeddings,
        **rope_fields(file, keys, yarn=model_type == "deepseek_v3"),
        "norm_epsilon": keys.rms_norm_eps,
        "tie_embeddings": keys.tie_word_embeddings,
    }
    if keys.dtype is not None:
        if keys.dtype not in _DTYPES:
            raise file.refuse(
                f"dtype {shown(keys.dtype)} is not supported (float32 and bfloat16 are)"
            )
        fields["dtype"] = _DTYPES[keys.dtype]
    return fields


def _experts(keys: MoeKeys) -> dict[str, Any]:
    """Key/value heads, and how many experts there are."""
    return {
        "head_dim": keys.head_dim,
        "num_experts": keys.num_experts,
        "moe_top_k": keys.num_experts_per_tok,
    }


def _mixtral(file: HuggingFaceFile, keys: MoeKeys) -> dict[str, Any]:
    return {
        **_experts(keys),
        "moe_ffn_hidden_size": keys.intermediate_size,
        "router_pre_softmax": False,  # Mixtral always renormalises the K weights
        "qk_norm": False,
    }


def _pre_softmax(keys: OlmoeKeys | Qwen3MoeKeys) -> bool:
    """Normalising the top-K of a full softmax equals a softmax over the K logits."""
    return not keys.norm_topk_prob


def _olmoe(file: HuggingFaceFile, keys: OlmoeKeys) -> dict[str, Any]:
    return {
        **_experts(keys),
        "router_pre_softmax": _pre_softmax(keys),
        "moe_ffn_hidden_size": keys.intermediate_size,
        "qk_norm": True,
        "qk_norm_scope": "layer",
    }


def _qwen3_moe(file: HuggingFaceFile, keys: Qwen3MoeKeys) -> dict[str, Any]:
    return {
        **_experts(keys),
        "router_pre_softmax": _pre_softmax(keys),
        "moe_ffn_hidden_size": keys.moe_intermediate_size,
        "moe_layer_freq": _moe_layers(keys),
        "qk_norm": True,
    }


def _qwen2_moe(file: HuggingFaceFile, keys: Qwen2MoeKeys) -> dict[str, Any]:
    return {
        **_qwen3_moe(file, keys),
        "qk_norm": False,
        "qkv_bias": keys.qkv_bias,
        # an expert of width 0 adds 0, whatever its gate says
        "shared_expert_ffn_hidden_size": keys.shared_expert_intermediate_size or None,
        "shared_expert_gate": keys.shared_expert_intermediate_size > 0,
    }


def _qwen3(file: HuggingFaceFile, keys: Qwen3Keys) -> dict[str, Any]:
    return {"head_dim": keys.head_dim, "num_experts": 0, "qk_norm": True}


def _deepseek_v3(file: HuggingFaceFile, keys: DeepseekV3Keys) -> dict[str, Any]:
    """Latent attention, and routing by sigmoid with a bias that only chooses."""
    limited = keys.n_group > 1
    _refuse_other_deepseeks(file, keys)
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


def _refuse_other_deepseeks(file: HuggingFaceFile, keys: DeepseekV3Keys) -> None:
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


def _moe_layers(keys: Qwen3MoeKeys) -> int | list[int]:
    """Qwen: layer i is MoE if decoder_sparse_step divides i + 1 and mlp_only_layers lacks i."""
    step, dense = keys.decoder_sparse_step, set(keys.mlp_only_layers)
    marks = [int((i + 1) % step == 0 and i not in dense) for i in range(keys.num_hidden_layers)]
    return 1 if all(marks) else marks


#: What differs between families: experts, router, norms, biases, attention.
_FAMILIES: Mapping[str, Callable[[HuggingFaceFile, Any], dict[str, Any]]] = {
    "qwen3_moe": _qwen3_moe,
    "qwen2_moe": _qwen2_moe,
    "mixtral": _mixtral,
    "olmoe": _olmoe,
    "deepseek_v3": _deepseek_v3,
    "qwen3": _qwen3,
}


def _refuse_the_rest(file: HuggingFaceFile, keys: CommonKeys, model_type: str) -> None:
    """Every key must have been mapped, be harmless, or have a value that means nothing."""
    # Qwen keeps a window's width beside the switch that turns it off; Mixtral has no switch
    switched_off = model_type != "mixtral" and not keys.use_sliding_window
    if keys.sliding_window is not None and not switched_off:
        raise file.refuse(f"sliding_window {keys.sliding_window} is not supported")
    if keys.use_sliding_window:
        raise file.refuse("use_sliding_window True is not supported")
    if set(keys.layer_types or ()) - {"full_attention"}:
        raise file.refuse("layer_types other than full_attention are not supported")
    for key, value in (keys.model_extra or {}).items():
        neutral = is_neutral(key, value, model_type)
        if neutral is None:
            raise file.refuse(f"key {shown(key)} is not understood")
        if not neutral:
            raise file.refuse(f"{key} {shown(value)} is not supported")
