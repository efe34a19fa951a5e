"""Rules of the algorithm: one function each, named after the rule (see ``checks.py``)."""

from __future__ import annotations

from typing import Callable

from megatron_rl.catalogue.entry import load
from megatron_rl.catalogue.kinds import LOSSES
from megatron_rl.config.algorithm import (
    advantages_of,
    advantages_settings,
    anchored_on_the_sampler,
    correction_of,
    correction_settings,
    distance_is_attached,
    has_gradient,
    loss_of,
    loss_settings,
    uses_router_shift,
)
from megatron_rl.config.rollout import engine_of, engines_with
from megatron_rl.config.schema import Config
from megatron_rl.errors import UserError


def loss_is_known(config: Config) -> None:
    """``algorithm.name`` is a loss, and ``algorithm.settings`` are settings of it."""
    loss_settings(config.algorithm)


def advantages_are_known(config: Config) -> None:
    """``algorithm.advantages`` is an advantage estimator, with settings of it."""
    advantages_settings(config.algorithm)


def correction_is_known(config: Config) -> None:
    """``algorithm.mismatch`` is none or a sampler correction, with settings of it."""
    correction_settings(config.algorithm)


def losses_heed_what_is_switched_on(config: Config) -> None:
    """Router shift and sampler weights need a loss that uses them."""
    algorithm = config.algorithm
    loss = loss_of(algorithm)
    found = None
    if loss.router_shift == "ignored" and uses_router_shift(algorithm):
        found, trait = "algorithm.router_shift.enabled is true", "router_shift='optional'"
        remedy = "set it to null"
    elif not loss.sampler_weights and algorithm.mismatch != "none":
        found, trait = f"algorithm.mismatch is {algorithm.mismatch}", "sampler_weights=True"
        remedy = "set it to none"
    if found is not None:
        raise UserError(
            f"{found} with the loss {algorithm.name}, which ignores it; expected a loss declared "
            f"with {trait} that acts on it; {remedy}, or take another loss"
        )


def the_sampler_is_corrected_once(config: Config) -> None:
    """A loss with the ratio pi_new / mu takes no weights pi_old / mu beside it; a correction that
    only leaves tokens out, by its settings' ``only_masks``, is none.
    """
    algorithm = config.algorithm
    correction = correction_settings(algorithm)
    if algorithm.mismatch == "none" or not anchored_on_the_sampler(algorithm):
        return
    if getattr(correction, "only_masks", False):
        return
    raise UserError(
        f"algorithm.mismatch is {algorithm.mismatch} with the loss {algorithm.name}, whose ratio "
        "is to the sampler already (setting anchor); expected none, off_policy_mask without cap, "
        "or kpop with weigh false; change it, or set algorithm.settings.anchor to old"
    )


def own_code_works(config: Config) -> None:
    """A user's own loss, advantage estimator and correction behave as declared, on a small made-up
    batch.
    """
    algorithm = config.algorithm
    trials = (
        ("check_loss", loss_of(algorithm), loss_settings(algorithm)),
        ("check_advantages", advantages_of(algorithm), advantages_settings(algorithm)),
        ("check_correction", correction_of(algorithm), correction_settings(algorithm)),
    )
    for name, row, settings in trials:
        if row is not None and row.own is not None:
            load(f"megatron_rl.algorithms.trial:{name}")(row, settings)


def router_shift_losses_have_it(config: Config) -> None:
    """A loss that needs router shift has it."""
    algorithm = config.algorithm
    if loss_of(algorithm).router_shift == "needed" and not uses_router_shift(algorithm):
        raise UserError(
            f"algorithm.router_shift.enabled is false with algorithm.name {algorithm.name}; "
            "expected true or null, because the loss scales ratios with it; set it to null, or "
            "take another loss (rspo without router shift is gmpo)"
        )


def dense_models_have_no_routers(config: Config) -> None:
    """Features that read routers need a MoE model."""
    algorithm = config.algorithm
    if config.model.num_experts:
        return
    if uses_router_shift(algorithm):
        found = f"algorithm.name {algorithm.name} with router shift"
        remedy = "take a loss without router shift (rspo without it is gmpo)"
    elif algorithm.routing_replay != "none":
        found = f"algorithm.routing_replay {algorithm.routing_replay}"
        remedy = "set it to none"
    else:
        return
    raise UserError(
        f"found {found} and a dense model (model.num_experts 0); expected a MoE model; {remedy}"
    )


def router_shift_variants_have_an_effect(config: Config) -> None:
    """Changed settings of router shift have an effect: it is on, and its mode uses them."""
    algorithm, shift = config.algorithm, config.algorithm.router_shift
    changed = [
        name
        for name in (
            "mode",
            "normalise",
            "distance",
            "experts",
            "layers",
            "stop_gradient",
            "penalty",
        )
        if getattr(shift, name) != type(shift).model_fields[name].default
    ]
    if changed and not uses_router_shift(algorithm):
        raise UserError(
            f"algorithm.router_shift.{changed[0]} is {_spelt(shift, changed[0])} with the loss "
            f"{algorithm.name}, which runs without router shift; expected "
            "algorithm.router_shift.enabled true, or the default"
        )
    if shift.mode == "token_weight" and not loss_of(algorithm).geometric:
        geometric = ", ".join(row.name for row in LOSSES.rows if row.geometric)
        raise UserError(
            f"algorithm.router_shift.mode is token_weight with the loss {algorithm.name}; expected "
            f"a geometric mean over tokens: {geometric}; change one of them"
        )
    if shift.mode == "token_weight" and shift.normalise != "none":
        raise UserError(
            f"algorithm.router_shift.normalise is {shift.normalise} with mode token_weight, whose "
            "mean a factor of gamma does not change; expected none"
        )
    default = type(shift).model_fields["quantile"].default
    if shift.quantile != default and shift.layers != "quantile":
        raise UserError(
            f"algorithm.router_shift.quantile is {shift.quantile:g} with layers {shift.layers}, "
            "which has none; expected algorithm.router_shift.layers quantile, or the default"
        )
    if shift.experts is not None and shift.distance != "top_k":
        raise UserError(
            f"algorithm.router_shift.experts is {shift.experts} with distance {shift.distance}, "
            "which does not count them; expected distance top_k, or null"
        )
    if shift.experts is not None and shift.experts > config.model.moe_top_k:
        raise UserError(
            f"algorithm.router_shift.experts is {shift.experts} with model.moe_top_k "
            f"{config.model.moe_top_k}; expected at most that many; lower it"
        )


def gradients_of_the_distance_arrive(config: Config) -> None:
    """The gradients of the penalty, and without the stop-gradient of gamma, reach the routers: the
    loss has them, or each router can add its own; and the loss keeps gamma's.
    """
    algorithm, parallel, shift = config.algorithm, config.parallel, config.algorithm.router_shift
    if not has_gradient(shift):
        return
    found, expected = None, "a gradient that arrives at the routers"
    if not distance_is_attached(config):
        hidden = (
            f"parallel.pipeline {parallel.pipeline}, whose stages pass distances on without one"
            if parallel.pipeline > 1
            else "parallel.recompute full, whose forward pass records none"
        )
        if not shift.stop_gradient:
            found = hidden
        elif shift.layers != "mean":
            found = f"layers {shift.layers} and {hidden}"
            expected = "layers mean, of which each router adds its part of the gradient"
    elif not shift.stop_gradient:
        arrives = load("megatron_rl.algorithms.trial:shift_has_a_gradient")
        if not arrives(loss_of(algorithm), loss_settings(algorithm)):
            found = f"the loss {algorithm.name}, whose ratio is a constant"
    if found is not None:
        asked = f"penalty is {shift.penalty:g}" if shift.stop_gradient else "stop_gradient is false"
        raise UserError(
            f"algorithm.router_shift.{asked} with {found}; expected {expected}; change one of them"
        )


def _spelt(section: object, name: str) -> str:
    """A value as YAML has it."""
    return str(getattr(section, name)).lower()


def replayed_routes_are_returned(config: Config) -> None:
    """R3 replays the sampler's experts, so the engine must return them."""
    engine = config.rollout.engine
    if config.algorithm.routing_replay == "r3" and not engine_of(config.rollout).routes:
        raise UserError(
            f"algorithm.routing_replay is r3 with rollout.engine {engine}, which does not return "
            f"the experts of its tokens; expected {engines_with('routes')}; change the "
            "engine, or take r2"
        )


def kl_penalty_has_a_reference(config: Config) -> None:
    """A KL penalty needs a reference policy."""
    algorithm = config.algorithm
    if algorithm.kl_coef > 0 and algorithm.reference == "none":
        raise UserError(
            f"algorithm.kl_coef is {algorithm.kl_coef:g} without a reference; expected "
            "algorithm.reference initial, or algorithm.kl_coef 0"
        )


def overlong_buffer_fits(config: Config) -> None:
    """The overlong buffer is no longer than the longest answer."""
    buffer, longest = config.reward.overlong_buffer, config.rollout.max_new_tokens
    if buffer > longest:
        raise UserError(
            f"reward.overlong_buffer {buffer} is above rollout.max_new_tokens {longest}; expected "
            "at most that; lower reward.overlong_buffer"
        )


ALGORITHM_RULES: tuple[Callable[[Config], None], ...] = (
    loss_is_known,
    advantages_are_known,
    correction_is_known,
    losses_heed_what_is_switched_on,
    the_sampler_is_corrected_once,
    router_shift_losses_have_it,
    dense_models_have_no_routers,
    router_shift_variants_have_an_effect,
    gradients_of_the_distance_arrive,
    replayed_routes_are_returned,
    kl_penalty_has_a_reference,
    overlong_buffer_fits,
    own_code_works,
)
