"""Rules of the architecture: one function each, named after the rule (see ``checks.py``)."""

from __future__ import annotations

from typing import Callable

from megatron_rl.catalogue.find import find
from megatron_rl.catalogue.kinds import FAMILIES
from megatron_rl.config.layout import heads_of
from megatron_rl.config.schema import Config
from megatron_rl.config.weight_names import layer_weights
from megatron_rl.errors import UserError


def heads_divide_hidden_size(config: Config) -> None:
    """Without head_dim, hidden_size is cut into num_attention_heads equal heads."""
    model = config.model
    given = model.head_dim or model.kv_lora_rank
    if not given and model.hidden_size % model.num_attention_heads:
        raise UserError(
            f"model.hidden_size {model.hidden_size} is no multiple of model.num_attention_heads "
            f"{model.num_attention_heads}; expected a multiple, or model.head_dim given"
        )


def head_dim_is_even(config: Config) -> None:
    """Rotary embeddings turn pairs of channels."""
    model = config.model
    if model.kv_lora_rank:
        name, width = "qk_rope_head_dim", model.qk_rope_head_dim or 2
    else:
        name, width = "head_dim", heads_of(model)[2]
    if width % 2:
        raise UserError(
            f"model.{name} is {width}; expected an even number for rotary embeddings; change it"
            + ("" if model.kv_lora_rank else ", or hidden_size / num_attention_heads")
        )


def query_groups_divide_heads(config: Config) -> None:
    """Each key/value head serves the same number of query heads."""
    model = config.model
    groups = model.num_query_groups
    if groups is not None and not model.kv_lora_rank and model.num_attention_heads % groups:
        raise UserError(
            f"model.num_query_groups {groups} does not divide model.num_attention_heads "
            f"{model.num_attention_heads}; expected a divisor"
        )


def yarn_needs_latent_attention(config: Config) -> None:
    """Grouped-query attention has the plain rotary embedding."""
    if config.model.yarn is not None and not config.model.kv_lora_rank:
        raise UserError(
            "model.yarn is given without latent attention (model.kv_lora_rank); expected null: "
            "stretched rotary embeddings are not implemented for grouped-query attention"
        )


def latent_attention_is_whole(config: Config) -> None:
    """Latent attention has all its widths, and no field of grouped-query attention."""
    model = config.model
    widths = ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
    given = [name for name in (*widths, "q_lora_rank") if getattr(model, name) is not None]
    if not model.kv_lora_rank:
        if given:
            raise UserError(
                f"model.{given[0]} {getattr(model, given[0])} is given without model.kv_lora_rank; "
                "expected both, for latent attention, or neither"
            )
        return
    missing = [name for name in widths if name not in given]
    if missing:
        raise UserError(
            f"model.kv_lora_rank {model.kv_lora_rank} is given without model.{missing[0]}; "
            f"expected {', '.join(widths)} with it (qk_nope_head_dim is the width without position)"
        )
    others = {"num_query_groups": None, "head_dim": None, "qkv_bias": False, "qk_norm": True}
    for name, expected in others.items():
        if getattr(model, name) != expected:
            raise UserError(
                f"model.{name} is {getattr(model, name)} with latent attention "
                f"(model.kv_lora_rank); expected {str(expected).lower().replace('none', 'null')}"
            )


def one_expert_is_no_choice(config: Config) -> None:
    """A router chooses among experts."""
    if config.model.num_experts == 1:
        raise UserError(
            "model.num_experts is 1; expected 2 or more, or 0 for a dense model (its MLPs are "
            "model.ffn_hidden_size wide)"
        )


def top_k_fits_experts(config: Config) -> None:
    """A token cannot be sent to more experts than there are."""
    model = config.model
    if 0 < model.num_experts < model.moe_top_k:
        raise UserError(
            f"model.moe_top_k {model.moe_top_k} is above model.num_experts {model.num_experts}; "
            "expected at most that; lower model.moe_top_k"
        )


def top_1_is_pre_softmax(config: Config) -> None:
    """A softmax over one logit is the constant 1: the router would get no gradient."""
    model = config.model
    if model.moe_top_k == 1 and model.router_score == "softmax" and not model.router_pre_softmax:
        raise UserError(
            "model.moe_top_k is 1 and model.router_pre_softmax false: the router would get no "
            "gradient; expected model.router_pre_softmax true"
        )


def expert_groups_fit(config: Config) -> None:
    """Group-limited routing: both numbers given, even groups, enough experts to choose from."""
    model = config.model
    groups, chosen = model.router_num_groups, model.router_group_top_k
    if groups is None and chosen is None:
        return
    if groups is None or chosen is None:
        raise UserError(
            f"model.router_num_groups is {groups} and model.router_group_top_k is {chosen}; "
            "expected both or neither"
        )
    if model.num_experts % groups:
        raise UserError(
            f"model.router_num_groups {groups} does not divide model.num_experts "
            f"{model.num_experts}; expected a divisor"
        )
    if chosen > groups or chosen * (model.num_experts // groups) < model.moe_top_k:
        raise UserError(
            f"model.router_group_top_k is {chosen} of {groups} groups of "
            f"{model.num_experts // groups} experts; expected at most {groups} groups holding at "
            f"least model.moe_top_k {model.moe_top_k} experts"
        )
    if chosen > model.moe_top_k:
        # Megatron ranks groups by their best moe_top_k // router_group_top_k experts
        raise UserError(
            f"model.router_group_top_k {chosen} is above model.moe_top_k {model.moe_top_k}; "
            "expected at most that"
        )


def moe_layer_list_is_complete(config: Config) -> None:
    """A list of MoE layers names every layer, and at least one is MoE."""
    model = config.model
    if isinstance(model.moe_layer_freq, int) or not model.num_experts:
        return
    if len(model.moe_layer_freq) != model.num_layers or not any(model.moe_layer_freq):
        raise UserError(
            f"model.moe_layer_freq has {len(model.moe_layer_freq)} entries, "
            f"{sum(model.moe_layer_freq)} of them 1; expected model.num_layers {model.num_layers} "
            "entries, at least one of them 1"
        )


def expert_bias_needs_sigmoid(config: Config) -> None:
    """Megatron's expert bias is defined for sigmoid scores."""
    model = config.model
    if model.router_expert_bias and model.router_score != "sigmoid":
        raise UserError(
            f"model.router_expert_bias is on with model.router_score {model.router_score}; "
            "expected sigmoid; set model.router_score or turn the bias off"
        )


def bias_update_needs_bias(config: Config) -> None:
    """Only an expert bias can be updated."""
    model = config.model
    if model.expert_bias_update_rate and not model.router_expert_bias:
        raise UserError(
            f"model.expert_bias_update_rate is {model.expert_bias_update_rate:g} without an "
            "expert bias; expected 0, or model.router_expert_bias true"
        )


def pre_softmax_needs_softmax(config: Config) -> None:
    """The order of softmax and top-K is a property of softmax routers."""
    model = config.model
    if model.router_pre_softmax and model.router_score != "softmax":
        raise UserError(
            f"model.router_pre_softmax is on with model.router_score {model.router_score}; "
            "expected softmax; turn one of them off"
        )


def shared_expert_gate_needs_expert(config: Config) -> None:
    """A gate without its shared expert gates nothing."""
    model = config.model
    if model.shared_expert_gate and model.shared_expert_ffn_hidden_size is None:
        raise UserError(
            "model.shared_expert_gate is on without a shared expert; expected "
            "model.shared_expert_ffn_hidden_size given, or the gate off"
        )


def frozen_router_has_no_router_losses(config: Config) -> None:
    """Frozen routers have no balancing loss and no bias update."""
    model = config.model
    names = ("aux_loss_coeff", "z_loss_coeff", "expert_bias_update_rate")
    on = [name for name in names if getattr(model, name)]
    if model.freeze_router and on:
        raise UserError(
            f"model.freeze_router is on with model.{on[0]} {getattr(model, on[0]):g}; expected 0; "
            "set it to 0 or unfreeze the router"
        )


def transformer_engine_needs_cuda(config: Config) -> None:
    """Transformer Engine has no CPU kernels."""
    if config.model.transformer_engine and config.device.kind == "cpu":
        raise UserError(
            "model.transformer_engine is on with device.kind cpu; expected CUDA; set device.kind "
            "to cuda or model.transformer_engine to null"
        )


def family_is_known(config: Config) -> None:
    """``model.family`` is a family of this package, or a user's own that can be imported."""
    if config.model.family is not None:
        find(FAMILIES, config.model.family)


def family_has_every_weight(config: Config) -> None:
    """A user's own family has a rule for each weight of the model."""
    if config.model.family is None:
        return
    family = find(FAMILIES, config.model.family).load()
    missing = [name for name in layer_weights(config.model) if name not in family.layer_weights]
    if missing:
        raise UserError(
            f"model.family {config.model.family} has no rule for the weight {missing[0]} of a "
            "layer; expected one for each weight of the model; add it to its layer_weights, or "
            "correct the fields that it reads"
        )


MODEL_RULES: tuple[Callable[[Config], None], ...] = (
    heads_divide_hidden_size,
    head_dim_is_even,
    query_groups_divide_heads,
    latent_attention_is_whole,
    yarn_needs_latent_attention,
    one_expert_is_no_choice,
    top_k_fits_experts,
    top_1_is_pre_softmax,
    expert_groups_fit,
    moe_layer_list_is_complete,
    expert_bias_needs_sigmoid,
    bias_update_needs_bias,
    pre_softmax_needs_softmax,
    shared_expert_gate_needs_expert,
    frozen_router_has_no_router_losses,
    transformer_engine_needs_cuda,
    family_is_known,
    family_has_every_weight,
)
