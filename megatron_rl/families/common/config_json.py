"""Keys of config.json that families share: sizes, norms, rotary embeddings, type; experts."""

from __future__ import annotations

from typing import Any, Mapping

from megatron_rl.errors import shown
from megatron_rl.families.common.file import HuggingFaceFile
from megatron_rl.families.common.keys import CommonKeys, MoeKeys
from megatron_rl.families.common.rope import rope_fields

_DTYPES = {"float32": "fp32", "bfloat16": "bf16"}


def read_common(
    file: HuggingFaceFile, keys: CommonKeys, *, yarn: bool = False, window_switch: bool = True
) -> dict[str, Any]:
    """The fields of ``ModelConfig`` that all families have.

    Args:
        file: for messages.
        keys: its content.
        yarn: whether the family's rotary embeddings can be stretched.
        window_switch: whether only ``use_sliding_window`` switches a sliding window on (Qwen keeps
            the width of a window that is off); otherwise a width switches it on.
    """
    fields = {
        "num_layers": keys.num_hidden_layers,
        "hidden_size": keys.hidden_size,
        "num_attention_heads": keys.num_attention_heads,
        "num_query_groups": keys.num_key_value_heads,
        "ffn_hidden_size": keys.intermediate_size,
        "vocab_size": keys.vocab_size,
        "max_sequence_length": keys.max_position_embeddings,
        **rope_fields(file, keys, yarn=yarn),
        "norm_epsilon": keys.rms_norm_eps,
        "tie_embeddings": keys.tie_word_embeddings,
    }
    if keys.dtype is not None:
        if keys.dtype not in _DTYPES:
            raise file.refuse(
                f"dtype {shown(keys.dtype)} is not supported (float32 and bfloat16 are)"
            )
        fields["dtype"] = _DTYPES[keys.dtype]
    if keys.sliding_window is not None and (keys.use_sliding_window or not window_switch):
        raise file.refuse(f"sliding_window {keys.sliding_window} is not supported")
    if keys.use_sliding_window:
        raise file.refuse("use_sliding_window True is not supported")
    if set(keys.layer_types or ()) - {"full_attention"}:
        raise file.refuse("layer_types other than full_attention are not supported")
    return fields


def write_common(model: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of config.json for these fields."""
    return {
        "vocab_size": model["vocab_size"],
        "hidden_size": model["hidden_size"],
        "intermediate_size": model["ffn_hidden_size"],
        "num_hidden_layers": model["num_layers"],
        "num_attention_heads": model["num_attention_heads"],
        "num_key_value_heads": model["num_query_groups"],
        "head_dim": model["head_dim"],
        "hidden_act": "silu",
        "max_position_embeddings": model["max_sequence_length"],
        "rms_norm_eps": model["norm_epsilon"],
        # both spellings: transformers 4 reads the first, 5 the second
        "rope_theta": model["rope_base"],
        "rope_parameters": {"rope_type": "default", "rope_theta": model["rope_base"]},
        "tie_word_embeddings": model["tie_embeddings"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "torch_dtype": {name: key for key, name in _DTYPES.items()}[model["dtype"]],
        "use_cache": True,
    }


def read_experts(keys: MoeKeys) -> dict[str, Any]:
    """Width of a head, and number of experts."""
    return {
        "head_dim": keys.head_dim,
        "num_experts": keys.num_experts,
        "moe_top_k": keys.num_experts_per_tok,
    }


def pre_softmax(norm_topk_prob: bool) -> bool:
    """``router_pre_softmax``: normalising the top K of a full softmax equals a softmax over the K
    logits.
    """
    return not norm_topk_prob


def dense_layers(model: Mapping[str, Any]) -> list[int]:
    """Indices of the layers without experts."""
    return [layer for layer, is_moe in enumerate(model["moe_layer_freq"]) if not is_moe]
