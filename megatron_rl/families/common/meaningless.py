"""Keys of config.json that no logit depends on, and values that mean a feature is absent.

Every key is mapped by a family, listed here, or refused.
"""

from __future__ import annotations

from typing import Any, Mapping

#: Keys without effect on the logits: generation, bookkeeping, kernels, training choices made
#: elsewhere.
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
#: Traces of tools.
IGNORED_PREFIXES = ("unsloth_",)

#: Keys that must have one of these values, which mean that the feature is absent: any other value
#: needs arithmetic that the models lack. Null is always allowed.
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


def is_meaningless(key: str, value: Any, of_family: Mapping[str, tuple[Any, ...]]) -> bool | None:
    """Whether a key's value has no effect; None: the key is unknown.

    ``of_family``: keys with values without effect in this family, which take precedence.
    """
    if key in IGNORED_KEYS or key.startswith(IGNORED_PREFIXES) or value is None:
        return True
    neutral = of_family.get(key, NEUTRAL_VALUES.get(key))
    return None if neutral is None else value in neutral
