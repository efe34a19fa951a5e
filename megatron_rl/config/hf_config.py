"""Map a Hugging Face config.json to ``ModelConfig`` fields; refuse what is not implemented.

Reads the spellings of transformers 4 (``rope_theta``, ``num_experts``, ``torch_dtype``) and 5
(``rope_parameters``, ``num_local_experts``, ``dtype``). A wrong architecture still loads and saves
every weight bit for bit, so a key neither mapped nor known to be harmless is an error.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Callable, Mapping

from megatron_rl.config.nearest import did_you_mean
from megatron_rl.errors import UserError

#: Keys without effect on the logits: generation, bookkeeping, training choices made elsewhere.
IGNORED_KEYS = frozenset(
    """_name_or_path architectures auto_map aux_loss_alpha bad_words_ids begin_suppress_tokens
    bos_token_id chunk_size_feed_forward decoder_start_token_id diversity_penalty do_sample
    early_stopping encoder_no_repeat_ngram_size eos_token_id ep_size
    exponential_decay_length_penalty finetuning_task forced_bos_token_id forced_eos_token_id
    id2label initializer_range is_decoder is_encoder_decoder label2id length_penalty max_length
    max_window_layers min_length model_type no_repeat_ngram_size num_beam_groups num_beams
    num_nextn_predict_layers num_return_sequences output_attentions output_hidden_states
    output_router_logits output_scores pad_token_id prefix pretraining_tp problem_type
    remove_invalid_values repetition_penalty return_dict return_dict_in_generate
    router_aux_loss_coef sep_token_id seq_aux suppress_tokens task_specific_params temperature
    tf_legacy_loss tie_encoder_decoder tokenizer_class top_k top_p torchscript
    transformers_version typical_p use_bfloat16 use_cache""".split()
)

#: Keys that must have one of these values: anything else is arithmetic the models do not have.
REQUIRED_VALUES: Mapping[str, tuple[Any, ...]] = {
    "add_cross_attention": (False,),
    "attention_bias": (False,),
    "attention_dropout": (0.0,),
    "clip_qkv": (None,),
    "cross_attention_hidden_size": (None,),
    "hidden_act": ("silu",),
    "mlp_bias": (False,),
    "pruned_heads": ({},),
    "quantization_config": (None,),
    "rope_interleave": (True,),
    "rope_scaling": (None,),
    "router_jitter_noise": (0.0,),
    "scoring_func": ("sigmoid",),
    "topk_method": ("noaux_tc",),
    "use_sliding_window": (False,),
}

_DTYPES = {"float32": "fp32", "bfloat16": "bf16"}


class _Reader:
    """The keys of one config.json; remembers which were read."""

    def __init__(self, path: Path, values: Mapping[str, Any]) -> None:
        self.path, self.values = path, values
        self.read: set[str] = set()

    def get(self, *spellings: str, default: Any = None) -> Any:
        """The value under the first spelling that is there and not null; spellings must agree."""
        self.read.update(spellings)
        found = {k: self.values[k] for k in spellings if self.values.get(k) is not None}
        if len(set(map(str, found.values()))) > 1:
            raise self.refuse(f"{' and '.join(f'{k}={v}' for k, v in found.items())} contradict")
        return next(iter(found.values()), default)

    def need(self, *spellings: str) -> Any:
        """As ``get``, for a key that has to be there."""
        value = self.get(*spellings)
        if value is None:
            raise self.refuse(f"{' or '.join(spellings)} is missing")
        return value

    def refuse(self, found: str) -> UserError:
        """The error for something in this file."""
        return UserError(f"{self.path}: {found}; expected {_EXPECTED}")


def read_hf_config(path: Path) -> dict[str, Any]:
    """The ``ModelConfig`` fields that a config.json (or the directory that holds it) determines.

    ``max_sequence_length`` is set to ``max_position_embeddings``; balancing losses are not taken.
    Raises UserError for an unknown model_type, a missing key, and any key whose meaning is not
    implemented (rope scaling, sliding windows, clip_qkv, quantization, biases but Qwen2's).
    """
    return _fields(_open(path))


def fields_of_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """As ``read_hf_config``, of the content of a config.json."""
    return _fields(_Reader(Path("config.json"), values))


def _fields(reader: _Reader) -> dict[str, Any]:
    model_type = _known_type(reader)
    fields = {**_common(reader, model_type), **_FAMILIES[model_type](reader)}
    _refuse_the_rest(reader, model_type)
    return fields


def read_model_type(path: Path) -> str:
    """The family that a config.json (or the directory that holds it) names. UserError: another."""
    return _known_type(_open(path))


def _open(path: Path) -> _Reader:
    file = path / "config.json" if path.is_dir() else path
    return _Reader(file, _read_json(file))


def _known_type(reader: _Reader) -> str:
    model_type = reader.values.get("model_type")
    if model_type not in MODEL_TYPES:
        hint = did_you_mean(str(model_type), MODEL_TYPES)
        raise reader.refuse(f"model_type {model_type!r} is not supported{hint}")
    return model_type


def _read_json(file: Path) -> dict[str, Any]:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"model.hf_config: cannot read {file} ({error.strerror}); expected a Hugging Face "
            "config.json or its directory"
        ) from error
    except ValueError as error:  # not JSON, or not UTF-8
        raise UserError(f"{file}: not valid JSON ({error})") from error
    if not isinstance(values, dict):
        raise UserError(f"{file}: found a {type(values).__name__}; expected a JSON object")
    return values


def _common(reader: _Reader, model_type: str) -> dict[str, Any]:
    """What all families spell alike."""
    fields = {
        "num_layers": reader.need("num_hidden_layers"),
        "hidden_size": reader.need("hidden_size"),
        "num_attention_heads": reader.need("num_attention_heads"),
        "num_query_groups": reader.need("num_key_value_heads"),
        "ffn_hidden_size": reader.need("intermediate_size"),
        "vocab_size": reader.need("vocab_size"),
        "max_sequence_length": reader.need("max_position_embeddings"),
        **_rope(reader, yarn=model_type == "deepseek_v3"),
        "norm_epsilon": reader.need("rms_norm_eps"),
        # every family's class leaves the embeddings untied unless its config.json says otherwise
        "tie_embeddings": reader.get("tie_word_embeddings", default=False),
    }
    dtype = reader.get("torch_dtype", "dtype")
    if dtype is not None:
        if dtype not in _DTYPES:
            raise reader.refuse(f"dtype {dtype!r} is not supported (float32 and bfloat16 are)")
        fields["dtype"] = _DTYPES[dtype]
    return fields


#: YaRN's numbers, all of which have to be there: their defaults differ between versions.
_YARN_KEYS = (
    "factor",
    "original_max_position_embeddings",
    "beta_fast",
    "beta_slow",
    "mscale",
    "mscale_all_dim",
)


def _rope(reader: _Reader, yarn: bool = False) -> dict[str, Any]:
    """``rope_base``, from ``rope_theta`` (transformers 4) or ``rope_parameters`` (5); and ``yarn``,
    where the family has it, from ``rope_scaling`` (4) or ``rope_parameters``.
    """
    nested = reader.get("rope_parameters", default={})
    theta = reader.get("rope_theta")
    scaling = (reader.get("rope_scaling") if yarn else None) or {}
    for name, found in (("rope_parameters", nested), ("rope_scaling", scaling)):
        if not isinstance(found, dict):
            raise reader.refuse(f"{name} is {found!r}, not an object")
    inner = nested.get("rope_theta")
    if theta is not None and inner is not None and theta != inner:
        raise reader.refuse(f"rope_theta={theta} and rope_parameters.rope_theta={inner} contradict")
    if theta is None and inner is None:
        raise reader.refuse("rope_theta or rope_parameters.rope_theta is missing")
    fields = {"rope_base": float(theta if inner is None else inner)}
    scaling = {**scaling, **nested}
    kinds = [scaling.pop(key) for key in ("type", "rope_type") if key in scaling]
    kind = kinds[0] if kinds else "default"
    scaling.pop("rope_theta", None)
    if kind == "yarn" and yarn:
        fields["yarn"] = _yarn(reader, scaling)
    elif kind != "default":
        raise reader.refuse(f"rope_type {kind!r} (rope scaling) is not supported")
    elif scaling:
        raise reader.refuse(f"rope_parameters.{min(scaling)} (rope scaling) is not supported")
    return fields


def _yarn(reader: _Reader, scaling: Mapping[str, Any]) -> dict[str, Any]:
    unknown = sorted(set(scaling) - set(_YARN_KEYS))
    if unknown:
        raise reader.refuse(f"yarn's {unknown[0]} {scaling[unknown[0]]!r} is not supported")
    missing = [key for key in _YARN_KEYS if not scaling.get(key)]
    if missing:
        raise reader.refuse(f"yarn's {missing[0]} is missing or 0")
    return dict(scaling)


def _experts(reader: _Reader) -> dict[str, Any]:
    """Key/value heads, and how many experts there are."""
    return {
        "head_dim": reader.get("head_dim"),
        "num_experts": reader.need("num_experts", "num_local_experts"),
        "moe_top_k": reader.need("num_experts_per_tok"),
    }


def _mixtral(reader: _Reader) -> dict[str, Any]:
    return {
        **_experts(reader),
        "moe_ffn_hidden_size": reader.need("intermediate_size"),
        "router_pre_softmax": False,  # Mixtral always renormalises the K weights
        "qk_norm": False,
    }


def _pre_softmax(reader: _Reader) -> bool:
    """Normalising the top-K of a full softmax equals a softmax over the K logits."""
    return not reader.get("norm_topk_prob", default=False)


def _olmoe(reader: _Reader) -> dict[str, Any]:
    return {
        **_experts(reader),
        "router_pre_softmax": _pre_softmax(reader),
        "moe_ffn_hidden_size": reader.need("intermediate_size"),
        "qk_norm": True,
        "qk_norm_scope": "layer",
    }


def _qwen3_moe(reader: _Reader) -> dict[str, Any]:
    return {
        **_experts(reader),
        "router_pre_softmax": _pre_softmax(reader),
        "moe_ffn_hidden_size": reader.need("moe_intermediate_size"),
        "moe_layer_freq": _moe_layers(reader),
        "qk_norm": True,
    }


def _qwen2_moe(reader: _Reader) -> dict[str, Any]:
    return {
        **_qwen3_moe(reader),
        "qk_norm": False,
        "qkv_bias": reader.get("qkv_bias", default=True),
        "shared_expert_ffn_hidden_size": reader.need("shared_expert_intermediate_size"),
        "shared_expert_gate": True,
    }


def _qwen3(reader: _Reader) -> dict[str, Any]:
    return {"head_dim": reader.get("head_dim"), "num_experts": 0, "qk_norm": True}


def _deepseek_v3(reader: _Reader) -> dict[str, Any]:
    """Latent attention, and routing by sigmoid with a bias that only chooses."""
    layers, dense = reader.need("num_hidden_layers"), reader.need("first_k_dense_replace")
    every = reader.get("moe_layer_freq", default=1)
    top_k = reader.need("num_experts_per_tok")
    groups = reader.get("n_group", default=1)
    limited = isinstance(groups, int) and groups > 1
    chosen = reader.get("topk_group", default=1)
    reader.get("head_dim", "qk_rope_head_dim")
    reader.get("qk_head_dim")  # the sum of its parts, given below
    if not reader.get("norm_topk_prob", default=True):
        raise reader.refuse("norm_topk_prob false with sigmoid scores is not supported")
    if limited and top_k // chosen != 2:
        # DeepSeek ranks groups by their two best experts, Megatron by their top_k // chosen best
        raise reader.refuse(
            f"topk_group {chosen} with num_experts_per_tok {top_k} is not supported (2 for each is)"
        )
    if reader.values.get("num_key_value_heads") != reader.values.get("num_attention_heads"):
        raise reader.refuse("num_key_value_heads other than num_attention_heads is not supported")
    width = reader.need("moe_intermediate_size")
    return {
        "num_query_groups": None,
        "kv_lora_rank": reader.need("kv_lora_rank"),
        "q_lora_rank": reader.get("q_lora_rank"),
        "qk_nope_head_dim": reader.need("qk_nope_head_dim"),
        "qk_rope_head_dim": reader.need("qk_rope_head_dim"),
        "v_head_dim": reader.need("v_head_dim"),
        "qk_norm": True,
        "num_experts": reader.need("n_routed_experts", "num_local_experts"),
        "moe_top_k": top_k,
        "moe_ffn_hidden_size": width,
        "moe_layer_freq": [int(i >= dense and i % every == 0) for i in range(layers)],
        "shared_expert_ffn_hidden_size": width * (reader.get("n_shared_experts") or 0) or None,
        "router_score": "sigmoid",
        "router_expert_bias": True,
        "router_num_groups": groups if limited else None,
        "router_group_top_k": chosen if limited else None,
        "router_scaling_factor": reader.get("routed_scaling_factor", default=1.0),
    }


def _moe_layers(reader: _Reader) -> int | list[int]:
    """Qwen: layer i is MoE if decoder_sparse_step divides i + 1 and mlp_only_layers lacks i."""
    layers = reader.need("num_hidden_layers")
    step = reader.get("decoder_sparse_step", default=1)
    dense = reader.get("mlp_only_layers", default=[])
    if not (isinstance(layers, int) and isinstance(step, int) and isinstance(dense, list)):
        raise reader.refuse(
            "num_hidden_layers, decoder_sparse_step or mlp_only_layers is malformed"
        )
    marks = [int(step > 0 and (i + 1) % step == 0 and i not in dense) for i in range(layers)]
    return 1 if all(marks) else marks


#: What differs between families: experts, router, norms, biases, attention.
_FAMILIES: Mapping[str, Callable[[_Reader], dict[str, Any]]] = {
    "qwen3_moe": _qwen3_moe,
    "qwen2_moe": _qwen2_moe,
    "mixtral": _mixtral,
    "olmoe": _olmoe,
    "deepseek_v3": _deepseek_v3,
    "qwen3": _qwen3,
}
MODEL_TYPES = tuple(_FAMILIES)
_EXPECTED = "a plain config.json of " + ", ".join(MODEL_TYPES)


def _refuse_the_rest(reader: _Reader, model_type: str) -> None:
    """Every key must have been mapped, be harmless, or have the one value that is implemented."""
    for key, value in reader.values.items():
        if key in reader.read or key in IGNORED_KEYS:
            continue
        if key == "sliding_window":
            # Qwen keeps a window's width beside the switch that turns it off; Mixtral has no switch
            switched_off = model_type != "mixtral" and not reader.values.get("use_sliding_window")
            if value is not None and not switched_off:
                raise reader.refuse(f"sliding_window {value} is not supported")
        elif key == "layer_types":
            if value is not None and set(value) != {"full_attention"}:
                raise reader.refuse("layer_types other than full_attention are not supported")
        elif key in REQUIRED_VALUES:
            if value is not None and value not in REQUIRED_VALUES[key]:
                raise reader.refuse(f"{key} {value!r} is not supported")
        elif value is not None:
            raise reader.refuse(f"key {key!r} is not understood")
