"""Rules of the algorithm, and the choices that the schema repeats from it."""

import math
from typing import get_args

import pytest

from megatron_rl.algorithms.distance_rules import DISTANCES
from megatron_rl.algorithms.interface import SHIFT_MODES
from megatron_rl.algorithms.layer_rules import LAYERS
from megatron_rl.algorithms.regularisers import ESTIMATORS
from megatron_rl.catalogue import kinds
from megatron_rl.config.algorithm import correction_settings, keeps_trace, uses_router_shift
from megatron_rl.config.checks import check_config
from megatron_rl.config.checks_algorithm import replayed_routes_are_returned
from megatron_rl.config.presets import MODEL_PRESETS
from megatron_rl.config.schema import AlgorithmConfig, Config, RouterShiftConfig
from megatron_rl.errors import UserError


def make(**sections):
    return Config.model_validate({"model": MODEL_PRESETS["tiny_moe"], **sections})


def test_choices_agree_with_the_algorithms():
    shift, algorithm = RouterShiftConfig.model_fields, AlgorithmConfig.model_fields
    assert get_args(shift["mode"].annotation) == SHIFT_MODES
    assert get_args(shift["layers"].annotation) == LAYERS
    assert get_args(shift["distance"].annotation) == DISTANCES
    assert set(get_args(algorithm["kl_estimator"].annotation)) == set(ESTIMATORS)


ACCEPTED = [
    {"name": "sapo", "settings": {"tau_positive": 2}},
    {"name": "grpo", "settings": {"clip_high": math.inf}},
    {"name": "grpo", "router_shift": {"enabled": True, "mode": "range", "layers": "max"}},
    {"name": "rspo", "router_shift": {"mode": "token_weight"}},
    {"name": "gmpo", "router_shift": {"floor": 0.5}},
    {"kl_coef": 0.1, "reference": "initial", "entropy_coef": 0.1},
    {"reference": "initial"},
    {"router_shift": {"layers": "quantile", "quantile": 0.5}},
    {"router_shift": {"layers": "quantile"}},
    {"router_shift": {"experts": 1}},
    {"name": "grpo", "routing_replay": "r2"},
    {"routing_replay": "r3", "trace_store": "pinned"},
    {"mismatch": "icepop"},
    {"mismatch": "tis", "mismatch_high": 0.3},
    {"mismatch": "kpop"},
    {"router_shift": {"layers": "last", "distance": "union"}},
    {"router_shift": {"distance": "gate_weighted", "stop_gradient": False}},
    {"name": "drpo", "router_shift": {"enabled": True, "stop_gradient": False}},
    {"name": "cispo", "router_shift": {"enabled": True, "penalty": 0.3}},
    {"name": "gmpo", "router_shift": {"enabled": True, "floor": 1.0, "penalty": 0.3}},
    {"name": "dppo_tv"},
    {"name": "dppo_tv", "mismatch": "kpop", "mismatch_settings": {"weigh": False}},
    {"name": "dppo_kl", "mismatch": "off_policy_mask", "mismatch_settings": {"delta": 0.05}},
    {"name": "drpo", "settings": {"anchor": "old"}, "mismatch": "kpop"},
    {"mismatch": "off_policy_mask", "mismatch_settings": {"cap": 2.0}},
]


@pytest.mark.parametrize(
    ("algorithm", "message"),
    [
        ({}, "found algorithm.name rspo with router shift and a dense model (model.num_experts 0)"),
        ({"name": "gmpo", "routing_replay": "r2"}, "found algorithm.routing_replay r2 and a dense"),
    ],
)
def test_a_dense_model_has_no_routers(algorithm, message):
    with pytest.raises(UserError) as error:
        check_config(
            make(algorithm=algorithm, model={"num_experts": 0}), None, "train", files=False
        )
    assert str(error.value).startswith(message)
    dense = make(algorithm={"name": "gmpo"}, model={"num_experts": 0})
    check_config(dense, None, "train", files=False)


@pytest.mark.parametrize("algorithm", ACCEPTED)
def test_accepted(algorithm):
    check_config(make(algorithm=algorithm), None, "train", files=False)


REFUSED = [
    (
        {"settings": {"clip_lo": 0.2}},
        "algorithm.settings.clip_lo is no setting of the loss rspo (did you mean clip_low?); "
        "expected one of clip_low, clip_high",
    ),
    ({"name": "grpo", "settings": {"length_divisor": 9}}, "is no setting of the loss grpo"),
    (
        {"settings": {"clip_low": "3e-4"}},
        "algorithm.settings.clip_low is '3e-4'; expected a number, above 0 (A token's log-",
    ),
    ({"settings": {"clip_low": True}}, "clip_low is True; expected a number, above 0"),
    ({"settings": {"clip_low": 0}}, "clip_low is 0; expected a number, above 0"),
    ({"settings": {"clip_low": math.nan}}, "clip_low is nan; expected a number, above 0"),
    (
        {"name": "sapo", "settings": {"tau_negative": math.inf}},
        "algorithm.settings.tau_negative is inf; expected a finite number",
    ),
    (
        {"router_shift": {"enabled": False}},
        "algorithm.router_shift.enabled is false with algorithm.name rspo; expected true or null",
    ),
    (
        {"name": "gmpo", "router_shift": {"layers": "max"}},
        "algorithm.router_shift.layers is max with the loss gmpo, which runs without router shift",
    ),
    (
        {"name": "grpo", "router_shift": {"enabled": True, "mode": "token_weight"}},
        "algorithm.router_shift.mode is token_weight with the loss grpo; expected a geometric mean "
        "over tokens: gspo, gmpo, rspo, rspo_v1",
    ),
    (
        {"router_shift": {"mode": "token_weight", "normalise": "batch_mean"}},
        "algorithm.router_shift.normalise is batch_mean with mode token_weight",
    ),
    (
        {"mismatch": "icepop", "mismatch_low": 5.0},
        "low 5 (algorithm.mismatch_low) is not below high 5 (algorithm.mismatch_high); expected",
    ),
    (
        {"router_shift": {"experts": 2, "distance": "union"}},
        "algorithm.router_shift.experts is 2 with distance union, which does not count them",
    ),
    (
        {"router_shift": {"experts": 9}},
        "algorithm.router_shift.experts is 9 with model.moe_top_k ",
    ),
    (
        {"router_shift": {"quantile": 0.5}},
        "algorithm.router_shift.quantile is 0.5 with layers mean, which has none; expected "
        "algorithm.router_shift.layers quantile, or the default",
    ),
    (
        {"name": "gmpo", "router_shift": {"layers": "quantile"}},
        "algorithm.router_shift.layers is quantile with the loss gmpo, which runs without router",
    ),
    ({"kl_coef": 0.1}, "algorithm.kl_coef is 0.1 without a reference; expected"),
    (
        {"name": "gmpo", "router_shift": {"stop_gradient": False}},
        "algorithm.router_shift.stop_gradient is false with the loss gmpo, which runs without",
    ),
    (
        {"name": "gmpo", "router_shift": {"penalty": 0.3}},
        "algorithm.router_shift.penalty is 0.3 with the loss gmpo, which runs without router",
    ),
    (
        {"name": "grpo", "router_shift": {"distance": "union"}},
        "algorithm.router_shift.distance is union with the loss grpo, which runs without router",
    ),
    *(
        (
            {"name": name, "router_shift": {"enabled": True, "stop_gradient": False}},
            f"stop_gradient is false with the loss {name}, whose ratio is a constant; expected a",
        )
        for name in ("cispo", "dppo_tv", "dppo_kl")
    ),
    (
        {"name": "dppo_tv", "mismatch": "tis"},
        "algorithm.mismatch is tis with the loss dppo_tv, whose ratio is to the sampler already",
    ),
    (
        {"name": "drpo", "mismatch": "off_policy_mask", "mismatch_settings": {"cap": 2.0}},
        "algorithm.mismatch is off_policy_mask with the loss drpo, whose ratio is to the sampler",
    ),
    (
        {"name": "drpo", "settings": {"anchor": "mu"}},
        "algorithm.settings.anchor is mu; expected one of sampler, old",
    ),
]


@pytest.mark.parametrize("algorithm, message", REFUSED)
def test_refused(algorithm, message):
    with pytest.raises(UserError) as error:
        check_config(make(algorithm=algorithm), None, "train", files=False)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("parallel", "words"),
    [
        ({"pipeline": 2}, "parallel.pipeline 2, whose stages pass distances on without one; "),
        ({"recompute": "full"}, "parallel.recompute full, whose forward pass records none; "),
    ],
)
@pytest.mark.parametrize(
    ("shift", "asked", "expected"),
    [
        ({"stop_gradient": False}, "stop_gradient is false with ", "a gradient that arrives at"),
        (
            {"penalty": 0.3, "layers": "max"},
            "penalty is 0.3 with layers max and ",
            "layers mean, of which each router",
        ),
    ],
)
def test_a_gradient_of_the_distance_needs_one_recorded_stage(
    shift, asked, expected, parallel, words
):
    config = make(algorithm={"router_shift": shift}, parallel=parallel)
    with pytest.raises(UserError, match=f"{asked}{words}expected {expected}"):
        check_config(config, None, "train", files=False)


@pytest.mark.parametrize("parallel", [{"pipeline": 2}, {"recompute": "full"}])
def test_each_router_adds_the_gradient_of_a_penalty_on_the_mean(parallel):
    algorithm = {"router_shift": {"penalty": 0.3, "layers": "mean"}}
    check_config(make(algorithm=algorithm, parallel=parallel), None, "train", files=False)


def test_supervised_training_does_not_look_at_the_loss():
    check_config(make(algorithm={"name": "none"}), None, "sft", files=False)


def test_the_overlong_buffer_is_part_of_the_answer():
    sections = {"rollout": {"max_new_tokens": 16}, "reward": {"overlong_buffer": 17}}
    with pytest.raises(UserError, match="reward.overlong_buffer 17 is above rollout.max_new_tok"):
        check_config(make(**sections), None, "train", files=False)
    sections["reward"] = {"overlong_buffer": 16}
    check_config(make(**sections), None, "train", files=False)


def silent_engine(parts):
    """An engine that does not say that it returns experts."""


def test_the_samplers_experts_need_an_engine_that_tells_them():
    name = f"{__name__}:silent_engine"
    config = make(algorithm={"routing_replay": "r3"}, rollout={"engine": name})
    with pytest.raises(UserError) as error:
        replayed_routes_are_returned(config)
    assert str(error.value) == (
        f"algorithm.routing_replay is r3 with rollout.engine {name}, which does not return the "
        "experts of its tokens; expected builtin or vllm or sglang; change the engine, or take r2"
    )


def test_a_trace_is_kept_for_router_shift_and_for_replay():
    kept = [
        keeps_trace(AlgorithmConfig(name=name, routing_replay=replay))
        for name, replay in (("rspo", "none"), ("grpo", "none"), ("grpo", "r2"), ("grpo", "r3"))
    ]
    assert kept == [True, False, True, True]


def test_what_follows_from_the_section():
    highs = [
        getattr(correction_settings(AlgorithmConfig(mismatch=kind)), "high", None)
        for kind in kinds.CORRECTIONS.names
    ]
    assert highs == [2, 2, 2, 5, None, None]
    chosen = AlgorithmConfig(mismatch="icepop", mismatch_high=3.0, mismatch_settings={"low": 0.1})
    assert correction_settings(chosen).model_dump() == {"low": 0.1, "high": 3.0}
    used = {name: uses_router_shift(AlgorithmConfig(name=name)) for name in kinds.LOSSES.names}
    assert [name for name in used if used[name]] == ["rspo", "rspo_v1"]
    assert uses_router_shift(AlgorithmConfig(name="gspo", router_shift={"enabled": True}))
