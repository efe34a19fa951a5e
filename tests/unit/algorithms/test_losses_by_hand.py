"""Two sequences worked out by hand: the ratios are round numbers, so that the terms are as well.

sequence 0: A = +2, ratios 1.5, 0.5        sequence 1: A = -1, ratios 2.0, 0.5, 1.0, 1.0
"""

from __future__ import annotations

import math

import pytest

from megatron_rl.algorithms import LOSSES, default_settings, make_settings
from tests.support.loss_batches import batch_of, loss_and_gradient

LOG2, LOG15 = math.log(2), math.log(1.5)
RATIOS = [[LOG15, -LOG2], [LOG2, -LOG2, 0.0, 0.0]]
ADVANTAGES = [2.0, -1.0]


def run(name, gammas=None, ratios=RATIOS, advantages=ADVANTAGES, **overrides):
    """(outputs, loss, gradient) of the batch above."""
    inputs = batch_of(ratios, advantages, gammas)
    outputs = LOSSES[name](inputs, make_settings(name, overrides))
    loss, gradient = loss_and_gradient(outputs, inputs)
    return outputs, loss.item(), gradient.tolist()


def mean(pair) -> float:
    return (pair[0] / pair[1]).item()


def test_grpo() -> None:
    # J: 2*1.2 (clipped), 2*0.5 | -2, -0.8 (clipped), -1, -1;  means 1.7 and -1.2
    outputs, loss, gradient = run("grpo")
    assert outputs.denominator.item() == 2
    assert loss == pytest.approx(-0.25)
    # unclipped: -w A / |y| / 2
    assert gradient == pytest.approx([0, -0.25, 0.25, 0, 0.125, 0.125])
    assert mean(outputs.metrics["clip_fraction"]) == pytest.approx(2 / 6)
    assert mean(outputs.metrics["ratio_mean"]) == pytest.approx(6.5 / 6)
    # k3 = w - 1 - ln w; the logarithms add up to ln 1.5 - ln 2
    assert mean(outputs.metrics["kl_old"]) == pytest.approx((6.5 - 6 - LOG15 + LOG2) / 6)


def test_dapo() -> None:
    # as grpo, upper bound 1.28, mean over 6 tokens: -(2.56 + 1 - 2 - 0.8 - 1 - 1)/6
    outputs, loss, gradient = run("dapo")
    assert outputs.denominator.item() == 6
    assert loss == pytest.approx(1.24 / 6)
    assert gradient == pytest.approx([0, -1 / 6, 2 / 6, 0, 1 / 6, 1 / 6])


def test_dr_grpo() -> None:
    # token sums 3.4 and -4.8 over a constant length of 10, mean over 2 sequences
    outputs, loss, gradient = run("dr_grpo", length_divisor=10)
    assert outputs.denominator.item() == 2
    assert loss == pytest.approx(1.4 / 20)
    assert gradient == pytest.approx([0, -1 / 20, 2 / 20, 0, 1 / 20, 1 / 20])


def test_gspo() -> None:
    # s_0 = sqrt(1.5 * 0.5) = 0.8660 (A > 0: low ratios are not clipped);  s_1 = 1 exactly
    outputs, loss, gradient = run("gspo")
    s = math.sqrt(0.75)
    assert loss == pytest.approx(-(2 * s - 1) / 2)
    assert gradient == pytest.approx([-s / 2, -s / 2] + [1 / 8] * 4)
    assert mean(outputs.metrics["clip_fraction"]) == 0
    assert outputs.metrics["clip_fraction"][1].item() == 2


def test_gspo_clips_whole_sequences() -> None:
    # mean log-ratio 5e-4 > ln(1.0004) with A > 0, and -5e-4 < ln(0.9997) with A < 0
    outputs, loss, gradient = run("gspo", ratios=[[1e-3, 0.0], [-5e-4]], advantages=[1.0, -1.0])
    assert loss == pytest.approx(-(1.0004 - 0.9997) / 2)
    assert gradient == [0, 0, 0]
    assert mean(outputs.metrics["clip_fraction"]) == 1


def test_gmpo() -> None:
    # ln 1.5 = 0.4055 -> 0.4 (A > 0);  -ln 2 = -0.693 -> -0.4 (A < 0), ln 2 stays
    outputs, loss, gradient = run("gmpo")
    g0, g1 = math.exp((0.4 - LOG2) / 2), math.exp((LOG2 - 0.4) / 4)
    assert loss == pytest.approx(-(2 * g0 - g1) / 2)
    assert gradient == pytest.approx([0, -g0 / 2, g1 / 8, 0, g1 / 8, g1 / 8])
    assert outputs.denominator.item() == 2
    assert mean(outputs.metrics["clip_fraction"]) == pytest.approx(2 / 6)


GAMMAS = [[0.8, 1.0], [0.5, 1.0, 0.5, 1.0]]


def test_rspo() -> None:
    # w~: 1.2, 0.5 (nothing clipped) | 1.0, 0.5 -> e^-0.4, 0.5 -> e^-0.4, 1.0
    outputs, loss, gradient = run("rspo", GAMMAS)
    g0, g1 = math.sqrt(1.2 * 0.5), math.exp(-0.8 / 4)
    assert loss == pytest.approx(-(2 * g0 - g1) / 2)
    assert gradient == pytest.approx([-g0 / 2, -g0 / 2, g1 / 8, 0, 0, g1 / 8])
    assert mean(outputs.metrics["clip_fraction"]) == pytest.approx(2 / 6)
    assert mean(outputs.metrics["router/gamma_mean"]) == pytest.approx(4.8 / 6)
    assert mean(outputs.metrics["ratio_mean"]) == pytest.approx(6.5 / 6)


def test_rspo_v1() -> None:
    # clipped ratios as in gmpo, then times gamma: 0.8 * e^0.4, 0.5 | 2 * 0.5, e^-0.4, 0.5, 1
    outputs, loss, gradient = run("rspo_v1", GAMMAS)
    g0 = math.sqrt(0.8 * math.exp(0.4) * 0.5)
    g1 = (math.exp(-0.4) * 0.5) ** 0.25
    assert loss == pytest.approx(-(2 * g0 - g1) / 2)
    assert gradient == pytest.approx([0, -g0 / 2, g1 / 8, 0, g1 / 8, g1 / 8])
    assert mean(outputs.metrics["clip_fraction"]) == pytest.approx(2 / 6)


def test_grpo_with_router_shift_weighs_each_token() -> None:
    # w~: 1.2, 0.5 | 1.0, 0.5, 0.5, 1.0;  J: 2.4, 1 | -1, -0.8, -0.8, -1
    _, loss, gradient = run("grpo", GAMMAS, clip_high=0.25)
    assert loss == pytest.approx(-(1.7 - 0.9) / 2)
    assert gradient == pytest.approx([-0.6, -0.25, 0.125, 0, 0, 0.125])


def test_cispo() -> None:
    # weight w capped at 1.6; logprobs are log-ratio - 1
    outputs, loss, gradient = run("cispo", clip_high=0.6)
    assert outputs.denominator.item() == 6
    expected = 1.5 * 2 * (LOG15 - 1) + 0.5 * 2 * (-LOG2 - 1)
    expected += -1.6 * (LOG2 - 1) - 0.5 * (-LOG2 - 1) + 2
    assert loss == pytest.approx(-expected / 6)
    assert gradient == pytest.approx([-3 / 6, -1 / 6, 1.6 / 6, 0.5 / 6, 1 / 6, 1 / 6])
    assert mean(outputs.metrics["clip_fraction"]) == pytest.approx(1 / 6)


def test_cispo_has_no_lower_bound_and_a_cap_of_five() -> None:
    _, _, gradient = run("cispo", ratios=[[-20.0, math.log(9)]], advantages=[1.0])
    assert gradient == pytest.approx([-math.exp(-20) / 2, -2.5])


def test_sapo() -> None:
    # at w = 1 the gate is 4/tau * 1/2 and the gradient weight is 1 for either temperature
    outputs, loss, gradient = run("sapo", ratios=[[0.0], [0.0]])
    assert loss == pytest.approx(-(2 * 2 / 1.0 - 2 / 1.05) / 2)
    assert gradient == pytest.approx([-1.0, 0.5])
    assert mean(outputs.metrics["gate_mean"]) == pytest.approx(1)
    # at w = 2: p = sigmoid(tau); gradient 4 p (1 - p) w A / |y|
    _, loss, gradient = run("sapo", ratios=[[LOG2]], advantages=[-1.0])
    p = 1 / (1 + math.exp(-1.05))
    assert loss == pytest.approx(4 / 1.05 * p)
    assert gradient == pytest.approx([8 * p * (1 - p)])


def test_paper_values() -> None:
    values = {name: vars(default_settings(name)) for name in LOSSES}
    clip = {"clip_low": 0.2, "clip_high": 0.2}
    log_clip = {"clip_low": 0.4, "clip_high": 0.4}
    sampler = {"anchor": "sampler"}
    assert values == {
        "grpo": clip,
        "dr_grpo": {**clip, "length_divisor": 3000.0},
        "dapo": {"clip_low": 0.2, "clip_high": 0.28},
        "gspo": {"clip_low": 3e-4, "clip_high": 4e-4},
        "gmpo": log_clip,
        "rspo": log_clip,
        "rspo_v1": log_clip,
        "cispo": {"clip_low": 1.0, "clip_high": 4.0},
        "sapo": {"tau_positive": 1.0, "tau_negative": 1.05},
        "dppo_tv": {**sampler, "divergence_low": 0.15, "divergence_high": 0.15, "ratio_cap": 20.0},
        "dppo_kl": {**sampler, "divergence_low": 0.05, "divergence_high": 0.05, "ratio_cap": 20.0},
        "drpo": {**sampler, "delta": 12.5},
    }
