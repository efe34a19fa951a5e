"""The content of a Hugging Face config.json, typed and bounded before anything is worked out of it.

A family's class lists the keys that its models are built from. Of every other key either no value
matters (``IGNORED_KEYS``), or some values mean nothing (``NEUTRAL_VALUES``), or it is refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Mapping

from pydantic import BaseModel, ConfigDict, Field

from megatron_rl.errors import UserError, printable

#: Keys without effect on the logits: generation, bookkeeping, which kernels are used, training
#: choices made elsewhere.
IGNORED_KEYS = frozenset(
    """_attn_implementation _attn_implementation_autoset _attn_implementation_internal
    _experts_implementation _experts_implementation_internal _flash_attn_2_enabled _name_or_path
    architectures attn_implementation auto_map aux_loss_alpha bad_words_ids begin_suppress_tokens
    bos_token_id cache_implementation chunk_size_feed_forward decoder_start_token_id
    diversity_penalty do_sample early_stopping encoder_no_repeat_ngram_size eos_token_id ep_size
    experts_implementation exponential_decay_length_penalty finetuning_task forced_bos_token_id
    forced_eos_token_id gradient_checkpointing id2label initializer_range is_decoder label2id
    length_penalty max_length max_window_layers min_length model_max_length model_type
    no_repeat_ngram_size num_beam_groups num_beams num_nextn_predict_layers num_return_sequences
    output_attentions output_hidden_states output_router_logits output_scores pad_token_id prefix
    pretraining_tp problem_type remove_invalid_values repetition_penalty return_dict
    return_dict_in_generate router_aux_loss_coef router_z_loss_coef sep_token_id seq_aux
    suppress_tokens task_specific_params temperature tf_legacy_loss tie_encoder_decoder
    tokenizer_class top_k top_p torchscript transformers_version typical_p use_bfloat16 use_cache
    use_return_dict""".split()
)
#: What tools leave of themselves.
IGNORED_PREFIXES = ("unsloth_",)

#: Keys that must have one of these values, which say that there is nothing of the kind: any other
#: is arithmetic the models do not have. Null means nothing everywhere.
NEUTRAL_VALUES: Mapping[str, tuple[Any, ...]] = {
    "add_cross_attention": (False,),
    "attention_bias": (False,),
    "attention_chunk_size": (),
    "attention_dropout": (0.0,),
    "attn_logit_softcapping": (),
    "clip_qkv": (),
    "cross_attention_hidden_size": (),
    "embd_pdrop": (0.0,),
    "embedding_multiplier": (1.0,),
    "final_logit_softcapping": (),
    "first_k_dense_replace": (0,),
    "hidden_act": ("silu", "swish"),
    "hidden_dropout": (0.0,),
    "is_causal": (True,),
    "is_encoder_decoder": (False,),
    "lm_head_bias": (False,),
    "logits_scaling": (1.0,),
    "mlp_bias": (False,),
    "mlp_only_layers": ([],),
    "decoder_sparse_step": (1,),
    "moe_layer_freq": (1,),
    "n_group": (1,),
    "n_shared_experts": (0,),
    "num_mtp_layers": (0,),
    "num_shared_experts": (0,),
    "partial_rotary_factor": (1.0,),
    "pruned_heads": ({},),
    "qkv_bias": (False,),
    "quantization_config": ({},),
    "resid_pdrop": (0.0,),
    "residual_dropout": (0.0,),
    "residual_multiplier": (1.0,),
    "rope_interleave": (True,),
    "routed_scaling_factor": (1.0,),
    "router_jitter_noise": (0.0,),
    "scoring_func": ("softmax",),
    "shared_expert_intermediate_size": (0,),
    "topk_group": (1,),
    "topk_method": ("greedy",),
    "use_bidirectional_attention": (False,),
    "use_mla": (False,),
    "use_qk_norm": (False,),
    "use_sliding_window": (False,),
}

#: Where a family has the thing for good, so that other values say what is so anyway.
NEUTRAL_VALUES_OF: Mapping[str, Mapping[str, tuple[Any, ...]]] = {
    "qwen3": {"use_qk_norm": (True,), "num_experts": (0,), "num_local_experts": (0,)},
    "qwen3_moe": {"use_qk_norm": (True,)},
    "olmoe": {"use_qk_norm": (True,)},
    "mixtral": {"norm_topk_prob": (True,)},
    "deepseek_v3": {
        "num_mtp_layers": (0, 1),  # as num_nextn_predict_layers: its tensors are refused
        "scoring_func": ("sigmoid",),
        "topk_method": ("noaux_tc",),
        "use_mla": (True,),
    },
}

#: Keys of the same meaning: the name below, and how files of transformers 4 and 5 spell it.
SPELLINGS: Mapping[str, tuple[str, ...]] = {
    "num_experts": ("num_experts", "num_local_experts"),
    "n_routed_experts": ("n_routed_experts", "num_local_experts"),
    "dtype": ("torch_dtype", "dtype"),
}

#: A list of layers is made of their number: no model has as many.
MOST_LAYERS = 10_000
Size = Annotated[int, Field(ge=1, le=1 << 30)]
Count = Annotated[int, Field(ge=0, le=1 << 30)]
Positive = Annotated[float, Field(gt=0.0, le=1e30)]


class _Keys(BaseModel):
    """Strict: "3" and 3.0 are no integers, true is none either."""

    model_config = ConfigDict(
        extra="allow", frozen=True, strict=True, allow_inf_nan=False, protected_namespaces=()
    )


class Rope(_Keys):
    """``rope_parameters``, or ``rope_scaling``."""

    rope_theta: Positive | None = None
    rope_type: str | None = None
    type: str | None = None
    partial_rotary_factor: float | None = None
    factor: Positive | None = None
    original_max_position_embeddings: Size | None = None
    beta_fast: Positive | None = None
    beta_slow: Positive | None = None
    mscale: Annotated[float, Field(ge=0.0, le=1e30)] | None = None
    mscale_all_dim: Annotated[float, Field(ge=0.0, le=1e30)] | None = None


class CommonKeys(_Keys):
    """What all families spell alike."""

    num_hidden_layers: Annotated[int, Field(ge=1, le=MOST_LAYERS)]
    hidden_size: Size
    num_attention_heads: Size
    num_key_value_heads: Size
    intermediate_size: Size
    vocab_size: Annotated[int, Field(ge=2, le=1 << 30)]
    max_position_embeddings: Annotated[int, Field(ge=2, le=1 << 40)]
    rms_norm_eps: Positive
    rope_theta: Positive | None = None
    rope_parameters: Rope | None = None
    rope_scaling: Rope | None = None
    # every family's class leaves the embeddings untied unless its config.json says otherwise
    tie_word_embeddings: bool = False
    dtype: str | None = None
    sliding_window: int | None = None
    use_sliding_window: bool = False
    layer_types: list[str] | None = None


class MoeKeys(CommonKeys):
    """Key/value heads, and how many experts there are."""

    head_dim: Size | None = None
    num_experts: Count
    num_experts_per_tok: Size


class OlmoeKeys(MoeKeys):
    norm_topk_prob: bool = False


class Qwen3MoeKeys(MoeKeys):
    norm_topk_prob: bool = False
    moe_intermediate_size: Size
    decoder_sparse_step: Size = 1
    mlp_only_layers: list[int] = []


class Qwen2MoeKeys(Qwen3MoeKeys):
    qkv_bias: bool = True
    shared_expert_intermediate_size: Count


class Qwen3Keys(CommonKeys):
    head_dim: Size | None = None


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
    n_routed_experts: Size
    num_experts_per_tok: Size
    n_group: Size = 1
    topk_group: Size = 1
    moe_intermediate_size: Size
    n_shared_experts: Count = 0
    norm_topk_prob: bool = True
    routed_scaling_factor: Positive = 1.0


KEYS: Mapping[str, type[CommonKeys]] = {
    "qwen3_moe": Qwen3MoeKeys,
    "qwen2_moe": Qwen2MoeKeys,
    "mixtral": MoeKeys,
    "olmoe": OlmoeKeys,
    "deepseek_v3": DeepseekV3Keys,
    "qwen3": Qwen3Keys,
}


MODEL_TYPES = tuple(KEYS)


@dataclass(frozen=True)
class HuggingFaceFile:
    """One config.json: where it is, and its keys that are not null."""

    path: Path
    values: Mapping[str, Any]

    def refuse(self, found: str) -> UserError:
        """The error for something in this file."""
        expected = f"a plain config.json of {', '.join(MODEL_TYPES)}"
        return UserError(f"{self.path}: {printable(found, 400)}; expected {expected}")


def given(values: Mapping[str, Any]) -> dict[str, Any]:
    """The keys that are not null."""
    return {key: value for key, value in values.items() if value is not None}


def shown(value: Any) -> str:
    """A value for a message; the beginning of a long one."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def is_neutral(key: str, value: Any, model_type: str) -> bool | None:
    """Whether the value of a key means nothing in the family; None: the key is not known."""
    if key in IGNORED_KEYS or key.startswith(IGNORED_PREFIXES) or value is None:
        return True
    neutral = NEUTRAL_VALUES_OF.get(model_type, {}).get(key, NEUTRAL_VALUES.get(key))
    return None if neutral is None else value in neutral
