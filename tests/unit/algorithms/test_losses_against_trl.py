"""The losses that TRL has too, judged by TRL's code: the same loss and the same gradient."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from megatron_rl.algorithms import LOSSES, make_settings
from megatron_rl.algorithms.mismatch import off_policy_mask
from megatron_rl.algorithms.regularisers import Regularisers, add_regularisers
from megatron_rl.catalogue.corrections import OffPolicyMaskSettings
from tests.support.loss_batches import batch_of, loss_and_gradient
from tests.support.trl_judge import trl_loss

trl = pytest.importorskip("trl", reason="trl is not installed; it comes with the extra `test`")
gmpo = pytest.importorskip("trl.experimental.gmpo", reason="this trl has no GMPO; update it")
GRPOTrainer, GMPOTrainer = trl.GRPOTrainer, gmpo.GMPOTrainer

PPO_CLIP = {"epsilon_low": 0.2, "epsilon_high": 0.2}
LOG_CLIP = {"epsilon_low": 0.4, "epsilon_high": 0.4}
SEQUENCE = {"loss_type": "grpo", "importance_sampling_level": "sequence"}
CASES = {
    "grpo": (GRPOTrainer, {"loss_type": "grpo", **PPO_CLIP}, {}),
    "dr_grpo": (
        GRPOTrainer,
        {"loss_type": "dr_grpo", "max_completion_length": 64, **PPO_CLIP},
        {"length_divisor": 64},
    ),
    "dapo": (GRPOTrainer, {"loss_type": "dapo", "epsilon_low": 0.2, "epsilon_high": 0.28}, {}),
    "gspo": (GRPOTrainer, {**SEQUENCE, "epsilon_low": 3e-4, "epsilon_high": 4e-4}, {}),
    "cispo": (GRPOTrainer, {"loss_type": "cispo", "epsilon_high": 5.0}, {}),
    # TRL rounds its temperatures to float32: 1.0625 survives that, 1.05 does not
    "sapo": (
        GRPOTrainer,
        {"loss_type": "sapo", "temperature_neg": 1.0625},
        {"tau_negative": 1.0625},
    ),
    "gmpo": (GMPOTrainer, LOG_CLIP, {}),
    "rspo": (GMPOTrainer, LOG_CLIP, {}),
}
#: gspo clips at 3e-4: the smallest spread leaves most of its sequences unclipped
SPREADS = [2e-4, 0.3, 1.0]
#: of each spread: 201 ragged batches a loss, with and without router shift
BATCHES = 67
WITH_AND_WITHOUT = [(name, shift) for name in CASES for shift in (False, True)]
WITH_AND_WITHOUT.remove(("rspo", False))


@pytest.mark.parametrize("spread", SPREADS)
@pytest.mark.parametrize("name, shift", WITH_AND_WITHOUT)
def test_same_loss_and_gradient(name, shift, spread) -> None:
    trainer_class, attributes, overrides = CASES[name]
    size_of_gradients = 0.0
    for seed in range(BATCHES):
        rng = torch.Generator().manual_seed(seed)
        lengths = torch.randint(1, 9, (6,), generator=rng).tolist()
        ratios = [(spread * torch.randn(n, generator=rng)).tolist() for n in lengths]
        gammas = [(1 - 0.2 * torch.rand(n, generator=rng)).tolist() for n in lengths]
        advantages = torch.randn(6, generator=rng).tolist()
        inputs = batch_of(ratios, advantages, gammas if shift else None)
        outputs = LOSSES[name](inputs, make_settings(name, overrides))
        loss, gradient = loss_and_gradient(outputs, inputs)
        judge = trl_loss(trainer_class, inputs, lengths, **attributes)
        (expected,) = torch.autograd.grad(judge, inputs.logprobs)
        torch.testing.assert_close(loss, judge.detach(), rtol=1e-7, atol=1e-10)
        torch.testing.assert_close(gradient, expected, rtol=1e-7, atol=1e-10)
        size_of_gradients += gradient.abs().sum().item()
    assert size_of_gradients > 0.1


def with_everything(lengths, seed):
    """A batch with sampler weights, reference log-probabilities and entropies."""
    rng = torch.Generator().manual_seed(seed)
    ratios = [(0.3 * torch.randn(n, generator=rng)).tolist() for n in lengths]
    inputs = batch_of(ratios, torch.randn(len(lengths), generator=rng).tolist())
    size = sum(lengths)
    weights = 2 * torch.rand(size, generator=rng, dtype=torch.float64)
    noise = torch.randn(size, generator=rng, dtype=torch.float64)
    return dataclasses.replace(
        inputs,
        sampler_weights=torch.where(weights < 0.5, 0.0, weights),
        ref_logprobs=inputs.old_logprobs + 0.3 * noise,
        entropy=torch.rand(size, generator=rng, dtype=torch.float64).requires_grad_(),
    )


GRPO_TRAINER = sorted(name for name, case in CASES.items() if case[0] is GRPOTrainer)


@pytest.mark.parametrize("name", GRPO_TRAINER)
def test_same_with_sampler_weights_and_entropy_bonus(name) -> None:
    """TRL too takes the mean entropy over tokens, and the sequence's mean weight in gspo."""
    trainer_class, attributes, overrides = CASES[name]
    if name == "gspo":  # wider, so that there is a gradient to compare
        attributes = {**attributes, "epsilon_low": 0.2, "epsilon_high": 0.2}
        overrides = {"clip_low": 0.2, "clip_high": 0.2}
    lengths = [3, 8, 1, 5]
    for seed in range(10):
        inputs = dataclasses.replace(with_everything(lengths, seed), ref_logprobs=None)
        outputs = LOSSES[name](inputs, make_settings(name, overrides))
        outputs = add_regularisers(outputs, inputs, Regularisers(entropy_coef=0.05))
        bonus = {"_entropy_bonus_enabled": True, "entropy_coef": 0.05}
        same_as_trl(
            outputs, inputs, trl_loss(trainer_class, inputs, lengths, **attributes, **bonus)
        )


@pytest.mark.parametrize("name", ["grpo", "dapo", "cispo", "gspo", "sapo", "gmpo"])
def test_same_with_a_kl_penalty(name) -> None:
    """Losses over sequences: of one length, since TRL takes the KL's mean as the loss takes its."""
    trainer_class, attributes, overrides = CASES[name]
    lengths = [3, 8, 1, 5] if name in ("dapo", "cispo") else [6] * 4
    for seed in range(10):
        inputs = dataclasses.replace(with_everything(lengths, seed), sampler_weights=None)
        outputs = LOSSES[name](inputs, make_settings(name, overrides))
        outputs = add_regularisers(outputs, inputs, Regularisers(kl_coef=0.1))
        judge = trl_loss(trainer_class, inputs, lengths, beta=0.1, **attributes)
        same_as_trl(outputs, inputs, judge)


@pytest.mark.parametrize("name", ["grpo", "dapo", "gspo", "cispo", "sapo"])
@pytest.mark.parametrize("anchor", ["sampler", "old"])
def test_same_with_the_off_policy_sequence_mask(name, anchor) -> None:
    """TRL measures from the sampler where it has its log-probabilities."""
    trainer_class, attributes, overrides = CASES[name]
    if name == "gspo":
        attributes = {**attributes, "epsilon_low": 0.2, "epsilon_high": 0.2}
        overrides = {"clip_low": 0.2, "clip_high": 0.2}
    lengths, left_out = [3, 8, 1, 5], 0
    for seed in range(40):
        inputs = dataclasses.replace(with_everything(lengths, seed), sampler_weights=None)
        inputs = dataclasses.replace(inputs, rollout_logprobs=inputs.ref_logprobs)
        inputs = dataclasses.replace(inputs, ref_logprobs=None, entropy=None)
        given = off_policy_mask(inputs, OffPolicyMaskSettings(delta=0.1, anchor=anchor))
        left_out += int(given.clipped.sum())
        weighed = dataclasses.replace(inputs, sampler_weights=given.weights)
        outputs = LOSSES[name](weighed, make_settings(name, overrides))
        if anchor == "old":
            inputs = dataclasses.replace(inputs, rollout_logprobs=None)
        mask = {"off_policy_mask_threshold": 0.1}
        judge = trl_loss(trainer_class, inputs, lengths, **attributes, **mask)
        loss = outputs.loss_sum / outputs.denominator
        torch.testing.assert_close(loss.detach(), judge.detach(), rtol=1e-7, atol=1e-10)
        (gradient,) = torch.autograd.grad(loss, inputs.logprobs)
        (expected,) = torch.autograd.grad(judge, inputs.logprobs)
        torch.testing.assert_close(gradient, expected, rtol=1e-7, atol=1e-10)
    assert left_out > 40


def same_as_trl(outputs, inputs, judge) -> None:
    loss = outputs.loss_sum / outputs.denominator
    torch.testing.assert_close(loss.detach(), judge.detach(), rtol=1e-7, atol=1e-10)
    leaves = [inputs.logprobs, inputs.entropy]
    found = torch.autograd.grad(loss, leaves, allow_unused=True)
    for got, want in zip(found, torch.autograd.grad(judge, leaves, allow_unused=True)):
        if got is not None or want is not None:
            torch.testing.assert_close(got, want, rtol=1e-7, atol=1e-10)
            assert got.abs().sum() > 1e-3
