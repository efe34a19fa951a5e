"""Rules of the algorithm: one function each, named after the rule (see ``checks.py``)."""

from __future__ import annotations

import math
from typing import Callable

from megatron_rl.config.algorithm import mismatch_high, uses_router_shift
from megatron_rl.config.hf_file import shown
from megatron_rl.config.names import (
    ADVANTAGE_NAMES,
    ENGINES_WITH_ROUTES,
    GEOMETRIC_LOSSES,
    LOSS_NAMES,
    LOSS_SETTINGS,
    ROUTER_SHIFT_LOSSES,
)
from megatron_rl.config.nearest import did_you_mean
from megatron_rl.config.schema import Config
from megatron_rl.config.yaml_text import is_name
from megatron_rl.errors import UserError


def loss_is_known(config: Config) -> None:
    """``algorithm.name`` is a loss."""
    known("algorithm.name", config.algorithm.name, LOSS_NAMES)


def loss_settings_are_known(config: Config) -> None:
    """``algorithm.settings`` has keys of that loss, and numbers above 0."""
    algorithm = config.algorithm
    names = LOSS_SETTINGS[algorithm.name]
    for key, value in algorithm.settings.items():
        if key not in names:
            raise UserError(
                f"algorithm.settings.{key if is_name(key) else shown(key)} is no setting of the "
                f"loss {algorithm.name}"
                f"{did_you_mean(key, names)}; expected one of {', '.join(names)}"
            )
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not number or not value > 0:
            hint = "; YAML reads 3e-4 as text, write 3.0e-4" if isinstance(value, str) else ""
            raise UserError(
                f"algorithm.settings.{key} is {shown(value)}; expected a number above 0{hint}"
            )
        if math.isinf(value) and not key.startswith("clip_"):
            raise UserError(f"algorithm.settings.{key} is {value}; expected a finite number")


def advantages_are_known(config: Config) -> None:
    """``algorithm.advantages`` is an advantage estimator."""
    known("algorithm.advantages", config.algorithm.advantages, ADVANTAGE_NAMES)


def router_shift_losses_have_it(config: Config) -> None:
    """rspo and rspo_v1 cannot do without router shift."""
    algorithm = config.algorithm
    if algorithm.name in ROUTER_SHIFT_LOSSES and not uses_router_shift(algorithm):
        raise UserError(
            f"algorithm.router_shift.enabled is false with algorithm.name {algorithm.name}; "
            "expected true or null, because the loss scales ratios with it; set it to null, or "
            "take another loss (rspo without router shift is gmpo)"
        )


def dense_models_have_no_routers(config: Config) -> None:
    """What looks at routers needs a MoE model."""
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
    """Settings of router shift are changed only where it is on and they do something."""
    algorithm, shift = config.algorithm, config.algorithm.router_shift
    changed = [
        name
        for name in ("mode", "normalise", "layers")
        if getattr(shift, name) != type(shift).model_fields[name].default
    ]
    if changed and not uses_router_shift(algorithm):
        raise UserError(
            f"algorithm.router_shift.{changed[0]} is {getattr(shift, changed[0])} with the loss "
            f"{algorithm.name}, which runs without router shift; expected "
            "algorithm.router_shift.enabled true, or the default"
        )
    if shift.mode == "token_weight" and algorithm.name not in GEOMETRIC_LOSSES:
        raise UserError(
            f"algorithm.router_shift.mode is token_weight with the loss {algorithm.name}; expected "
            f"a geometric mean over tokens: {', '.join(GEOMETRIC_LOSSES)}; change one of them"
        )
    if shift.mode == "token_weight" and shift.normalise != "none":
        raise UserError(
            f"algorithm.router_shift.normalise is {shift.normalise} with mode token_weight, whose "
            "mean is the same whatever gamma is divided by; expected none"
        )
    default = type(shift).model_fields["quantile"].default
    if shift.quantile != default and shift.layers != "quantile":
        raise UserError(
            f"algorithm.router_shift.quantile is {shift.quantile:g} with layers {shift.layers}, "
            "which has none; expected algorithm.router_shift.layers quantile, or the default"
        )


def replayed_routes_are_returned(config: Config) -> None:
    """R3 replays the sampler's experts, so the engine has to tell them."""
    engine = config.rollout.engine
    if config.algorithm.routing_replay == "r3" and engine not in ENGINES_WITH_ROUTES:
        raise UserError(
            f"algorithm.routing_replay is r3 with rollout.engine {engine}, which does not return "
            f"the experts of its tokens; expected {' or '.join(ENGINES_WITH_ROUTES)}; change the "
            "engine, or take r2"
        )


def mismatch_bounds_are_in_order(config: Config) -> None:
    """IcePop's lower bound is below the upper one."""
    algorithm = config.algorithm
    low, high = algorithm.mismatch_low, mismatch_high(algorithm)
    if algorithm.mismatch == "icepop" and low >= high:
        raise UserError(
            f"algorithm.mismatch_low {low:g} is not below algorithm.mismatch_high {high:g}; "
            "expected less; change one of them"
        )


def kl_penalty_has_a_reference(config: Config) -> None:
    """A KL penalty is taken towards some policy."""
    algorithm = config.algorithm
    if algorithm.kl_coef > 0 and algorithm.reference == "none":
        raise UserError(
            f"algorithm.kl_coef is {algorithm.kl_coef:g} without a reference; expected "
            "algorithm.reference initial, or algorithm.kl_coef 0"
        )


def overlong_buffer_fits(config: Config) -> None:
    """The stretch over which long answers are punished is part of the longest answer."""
    buffer, longest = config.reward.overlong_buffer, config.rollout.max_new_tokens
    if buffer > longest:
        raise UserError(
            f"reward.overlong_buffer {buffer} is above rollout.max_new_tokens {longest}; expected "
            "at most that; lower reward.overlong_buffer"
        )


ALGORITHM_RULES: tuple[Callable[[Config], None], ...] = (
    loss_is_known,
    loss_settings_are_known,
    advantages_are_known,
    router_shift_losses_have_it,
    dense_models_have_no_routers,
    router_shift_variants_have_an_effect,
    replayed_routes_are_returned,
    mismatch_bounds_are_in_order,
    kl_penalty_has_a_reference,
    overlong_buffer_fits,
)


def known(field: str, name: str, names: tuple[str, ...]) -> None:
    """Refuse a name that is not among those there are, and name the nearest."""
    if name not in names:
        hint = did_you_mean(name, names)
        raise UserError(f"{field} is {shown(name)}{hint}; expected one of {', '.join(names)}")
