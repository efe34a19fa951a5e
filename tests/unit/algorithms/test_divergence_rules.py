"""Rules on the probability of the sampled token: DPPO, DRPO, KPop, the off-policy sequence mask."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from megatron_rl.algorithms import LOSSES, make_settings
from megatron_rl.algorithms.divergence import binary_kl
from megatron_rl.algorithms.interface import LossInputs
from megatron_rl.algorithms.mismatch import kpop, off_policy_mask
from megatron_rl.catalogue.corrections import KpopSettings, OffPolicyMaskSettings
from tests.support.loss_batches import (
    loss_and_gradient,
    random_batch,
    slow_value_and_gradient,
)
from tests.support.slow_losses import bernoulli_kl

BATCHES = 200
RULES = {
    "dppo_tv": [{}, {"anchor": "old", "divergence_low": 0.02, "divergence_high": 0.05}],
    "dppo_kl": [{}, {"anchor": "old", "divergence_low": 0.002, "ratio_cap": 1.1}],
    "drpo": [{}, {"anchor": "old", "delta": 0.1}],
}


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("shift", [False, True])
def test_losses_on_200_ragged_batches(name, shift):
    """Values and gradients, with either anchor; every second batch with router shift's range."""
    cut = 0
    for seed in range(BATCHES):
        overrides = RULES[name][seed % 2]
        inputs = random_batch(seed, 1 + seed % 6, [0.05, 0.3, 1.0][seed % 3], shift)
        inputs = dataclasses.replace(inputs, shift_mode="range" if seed % 4 > 1 else "ratio")
        settings = make_settings(name, overrides)
        outputs = LOSSES[name](inputs, settings)
        (gradient,) = torch.autograd.grad(outputs.loss_sum, inputs.logprobs)
        total, _, expected = slow_value_and_gradient(name, inputs, settings)
        torch.testing.assert_close(outputs.loss_sum.detach(), total, rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-11)
        cut += int(outputs.metrics["clip_fraction"][0])
    assert cut > BATCHES or name == "drpo"


def by_hand(p, q, advantages, mu=None, gamma=None, mode="ratio"):
    """Sequences of one token each, with probabilities p, of the old policy q, of the sampler mu."""

    def log(values):
        return torch.tensor(values, dtype=torch.float64).log()

    size = len(p)
    return LossInputs(
        logprobs=log(p).requires_grad_(),
        old_logprobs=log(q),
        advantages=torch.tensor(advantages, dtype=torch.float64),
        mask=torch.ones(size, dtype=torch.bool),
        sequence_ids=torch.arange(size),
        router_shift=None if gamma is None else torch.tensor(gamma, dtype=torch.float64),
        rollout_logprobs=log(q if mu is None else mu),
        shift_mode=mode,
    )


def run(name, inputs, **overrides):
    outputs = LOSSES[name](inputs, make_settings(name, overrides))
    loss, gradient = loss_and_gradient(outputs, inputs)
    return outputs, loss.item(), gradient.tolist()


def test_dppo_tv():
    # moved +0.2, +0.2, -0.2, -0.2, -0.1: out are the first (A > 0) and the fourth (A < 0)
    inputs = by_hand([0.6, 0.6, 0.4, 0.4, 0.5], [0.4, 0.4, 0.6, 0.6, 0.6], [1, -1, 1, -1, -2])
    outputs, loss, gradient = run("dppo_tv", inputs)
    assert outputs.clipped.tolist() == [True, False, False, True, False]
    assert outputs.metrics["clip_fraction"][0] == 2 and outputs.denominator == 5
    # -A r / 5
    assert gradient == pytest.approx([0, 1.5 / 5, -(2 / 3) / 5, 0, 2 * (5 / 6) / 5])
    value = 1.5 * math.log(0.6) - (2 / 3) * math.log(0.4) + 2 * (5 / 6) * math.log(0.5)
    assert loss == pytest.approx(value / 5)


def test_a_rare_token_may_have_a_large_ratio_in_dppo():
    """1e-5 to 1e-3: a ratio of 100 that GRPO clips; 20 of it count."""
    inputs = by_hand([1e-3, 0.8], [1e-5, 0.99], [1.0, -1.0])
    outputs, _, gradient = run("dppo_tv", inputs)
    assert outputs.clipped.tolist() == [False, True]  # 0.99 to 0.8: GRPO would keep it
    assert gradient == pytest.approx([-20 / 2, 0])
    assert run("dppo_tv", inputs, ratio_cap=math.inf)[2] == pytest.approx([-100 / 2, 0])


def test_dppo_kl():
    # KL(0.5 || 0.7) = 0.0872, KL(0.5 || 0.6) = 0.0204, KL(0.5 || 0.3) = 0.0872
    inputs = by_hand([0.7, 0.6, 0.3, 0.7, 0.3], [0.5] * 5, [1, 1, -1, -1, 1])
    outputs, _, gradient = run("dppo_kl", inputs)
    assert outputs.clipped.tolist() == [True, False, True, False, False]
    assert gradient == pytest.approx([0, -1.2 / 5, 0, 1.4 / 5, -0.6 / 5])
    wider = run("dppo_kl", inputs, divergence_high=0.088)[0]
    assert wider.clipped.tolist() == [False, False, True, False, False]
    narrower = run("dppo_kl", inputs, divergence_high=0.02, divergence_low=0.087)[0]
    assert narrower.clipped.tolist() == [True, True, True, False, False]


def test_drpo():
    # q 0.5, A 2, delta 0.4: r 1.2, p - q 0.1: factor 0.75;  r 0.4, p - q -0.3, A -1: factor 0.25
    inputs = by_hand([0.6, 0.2], [0.5, 0.5], [2, -1])
    outputs, loss, gradient = run("drpo", inputs, delta=0.4)
    first = 2 * 1.2 - 2 * 0.5 * 0.2**2 / 0.8
    second = -0.4 - 0.5 * 0.6**2 / 0.8
    assert loss == pytest.approx(-(first + second) / 2)
    assert gradient == pytest.approx([-2 * 1.2 * 0.75 / 2, 0.4 * 0.25 / 2])
    assert outputs.metrics["gate_mean"][0].item() == pytest.approx(1.0)
    assert outputs.clipped is None
    # at p - q = delta the gradient is 0, beyond it is turned back
    assert run("drpo", by_hand([0.9], [0.5], [2.0]), delta=0.4)[2] == pytest.approx([0], abs=1e-12)
    assert run("drpo", by_hand([0.9], [0.5], [2.0]), delta=0.2)[2] == pytest.approx([2 * 1.8])


def test_the_anchor_is_the_sampler_or_the_old_policy():
    inputs = by_hand([0.5], [0.4], [1.0], mu=[0.25])
    assert run("dppo_tv", inputs)[0].clipped.item()  # moved 0.25
    assert run("dppo_tv", inputs, anchor="old")[2] == pytest.approx([-0.5 / 0.4])
    assert run("drpo", inputs)[2] == pytest.approx([-2 * (1 - 0.25 / 12.5)])
    assert run("drpo", inputs, anchor="old")[2] == pytest.approx([-1.25 * (1 - 0.1 / 12.5)])
    assert run("drpo", inputs)[0].metrics["ratio_mean"][0].item() == pytest.approx(1.25)
    unknown = dataclasses.replace(inputs, rollout_logprobs=None)
    for name in RULES:
        with pytest.raises(ValueError, match="no rollout_logprobs"):
            run(name, unknown)
        run(name, unknown, anchor="old")


def test_router_shift_in_dppo_and_drpo():
    # ratio: r~ = 0.5 * 1.6 = 0.8, p~ = 0.4, which has moved by -0.1;  range: bound 0.15 * 0.5
    shifted = by_hand([0.8], [0.5], [1.0], gamma=[0.5])
    assert run("dppo_tv", by_hand([0.8], [0.5], [1.0]))[2] == [0]
    assert run("dppo_tv", shifted)[2] == pytest.approx([-0.8])
    assert run("drpo", shifted, delta=0.2)[2] == pytest.approx([-0.8 * 1.5])
    narrow = by_hand([0.6], [0.5], [1.0], gamma=[0.5], mode="range")
    assert run("dppo_tv", narrow)[2] == [0]
    assert run("dppo_tv", by_hand([0.6], [0.5], [1.0]))[2] == pytest.approx([-1.2])
    assert run("drpo", narrow, delta=0.4)[2] == pytest.approx([-1.2 * 0.5])


def test_binary_kl():
    a = torch.tensor([0.8, 0.5, 0.5, 1.0, 1.0, 0.999999], dtype=torch.float64)
    b = torch.tensor([0.5, 0.8, 0.5, 0.5, 1.0, 0.999998], dtype=torch.float64)
    expected = [bernoulli_kl(x, y) for x, y in zip(a.tolist(), b.tolist())]
    assert expected[0] == pytest.approx(0.8 * math.log(1.6) + 0.2 * math.log(0.4))
    torch.testing.assert_close(binary_kl(a.log(), b.log()).tolist(), expected)
    # the sure: far, and finite; equal policies: never below 0, also after rounding
    far = binary_kl(torch.tensor([-0.1]), torch.tensor([0.0]))
    assert far.isfinite().all() and far.item() > 5
    new = -3 * torch.rand(1000, generator=torch.Generator().manual_seed(0))
    near = binary_kl(new, new + 1e-6)
    assert (near >= 0).all() and near.max() < 1e-5


def test_kpop():
    # KL both ways of 0.5 and 0.6: 0.0204, 0.0201; of 0.5 and 0.8: 0.2231, 0.1927
    inputs = by_hand([0.1] * 4, [0.6, 0.8, 0.5, 0.5], [1.0] * 4, mu=[0.5, 0.5, 0.8, 0.5])
    found = kpop(inputs, KpopSettings())
    assert found.weights.tolist() == pytest.approx([1.2, 0, 0, 1])
    assert found.clipped.tolist() == [False, True, True, False]
    assert kpop(inputs, KpopSettings(phi=0.2)).weights.tolist() == pytest.approx([1.2, 0, 0, 1])
    loose = kpop(inputs, KpopSettings(phi=0.23))
    assert loose.weights.tolist() == pytest.approx([1.2, 1.6, 0.625, 1])
    assert kpop(inputs, KpopSettings(weigh=False)).weights.tolist() == [1, 0, 0, 1]


def slow_kpop(inputs, phi):
    weights = []
    for t in range(len(inputs.mask)):
        if not inputs.mask[t]:
            weights.append(0.0)
            continue
        old, mu = math.exp(inputs.old_logprobs[t]), math.exp(inputs.rollout_logprobs[t])
        near = bernoulli_kl(old, mu) <= phi and bernoulli_kl(mu, old) <= phi
        weights.append(old / mu if near else 0.0)
    return weights


def slow_off_policy_mask(inputs, delta, cap):
    weights = [0.0] * len(inputs.mask)
    for sequence in set(inputs.sequence_ids.tolist()):
        places = [t for t in range(len(weights)) if inputs.sequence_ids[t] == sequence]
        places = [t for t in places if inputs.mask[t]]
        drift = [(inputs.rollout_logprobs[t] - inputs.logprobs[t]).item() for t in places]
        if places and inputs.advantages[places[0]] < 0 and sum(drift) / len(drift) > delta:
            continue
        for t in places:
            rho = math.exp(inputs.old_logprobs[t] - inputs.rollout_logprobs[t])
            weights[t] = 1.0 if cap is None else min(rho, cap)
    return weights


def test_corrections_on_200_ragged_batches():
    """Weights, and through a loss its gradient: that of the loss without a weight, times it."""
    left_out = dict.fromkeys(("kpop", "mask"), 0)
    for seed in range(BATCHES):
        inputs = random_batch(seed, 1 + seed % 6, 0.3)
        cap = [None, 1.05][seed % 2]
        cases = {
            "kpop": (kpop(inputs, KpopSettings(phi=0.01)), slow_kpop(inputs, 0.01)),
            "mask": (
                off_policy_mask(inputs, OffPolicyMaskSettings(delta=0.05, cap=cap)),
                slow_off_policy_mask(inputs, 0.05, cap),
            ),
        }
        for name, (found, expected) in cases.items():
            expected = torch.tensor(expected, dtype=torch.float64)
            torch.testing.assert_close(found.weights, expected, rtol=1e-12, atol=1e-14)
            left_out[name] += int(((expected == 0) & inputs.mask).sum())
            plain = LOSSES["dapo"](inputs, make_settings("dapo", {}))
            weighed = dataclasses.replace(inputs, sampler_weights=found.weights)
            outputs = LOSSES["dapo"](weighed, make_settings("dapo", {}))
            (wanted,) = torch.autograd.grad(plain.loss_sum, inputs.logprobs)
            (gradient,) = torch.autograd.grad(outputs.loss_sum, inputs.logprobs)
            torch.testing.assert_close(gradient, wanted * expected, rtol=1e-10, atol=1e-13)
    assert min(left_out.values()) > BATCHES / 2


def test_off_policy_mask_by_hand():
    # log(q / p): 0.69 and 0 (mean 0.35) | 0.69 | 0.11
    inputs = by_hand([0.25, 0.5, 0.25, 0.45], [0.5] * 4, [-1, -1, 1, -1], mu=[0.5, 0.5, 0.5, 0.4])
    inputs = dataclasses.replace(inputs, sequence_ids=torch.tensor([0, 0, 1, 2]))
    found = off_policy_mask(inputs, OffPolicyMaskSettings())
    assert found.weights.tolist() == [0, 0, 1, 1] and not found.weights.requires_grad
    assert found.clipped.tolist() == [True, True, False, False]
    loose = off_policy_mask(inputs, OffPolicyMaskSettings(delta=0.35))
    assert loose.weights.tolist() == [1, 1, 1, 1]
    # from the old policy the last has moved by 0.105, from the sampler the other way
    old = off_policy_mask(inputs, OffPolicyMaskSettings(anchor="old"))
    assert old.weights.tolist() == [0, 0, 1, 0]
    capped = off_policy_mask(inputs, OffPolicyMaskSettings(cap=1.2))
    assert capped.weights.tolist() == pytest.approx([0, 0, 1, 1.2])
    assert capped.clipped.tolist() == [True, True, False, True]
