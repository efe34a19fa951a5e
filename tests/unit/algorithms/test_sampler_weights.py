"""Sampler weights on the terms of the losses: by hand, against loops, and their metrics."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_rl.algorithms import LOSSES, default_settings
from megatron_rl.algorithms.mismatch import mismatch_metrics
from megatron_rl.catalogue import kinds
from megatron_rl.catalogue.find import find
from megatron_rl.errors import UserError
from tests.support.loss_batches import batch_of, loss_and_gradient, random_batch

TOKEN_LOSSES = ("grpo", "dr_grpo", "dapo", "cispo", "sapo", "dppo_tv", "dppo_kl", "drpo")
SEQUENCE_LOSSES = ("gspo", "gmpo", "rspo", "rspo_v1")


def slow_weights(inputs, kind, low, high):
    """(weights, how many were capped or zeroed), token by token."""
    size = len(inputs.mask)
    weights, cut = [0.0] * size, 0
    for t in range(size):
        if not inputs.mask[t]:
            continue
        members = [
            u
            for u in range(size)
            if inputs.mask[u] and inputs.sequence_ids[u] == inputs.sequence_ids[t]
        ]
        places = members if kind == "mis_sequence" else [t]
        rho = 1.0
        for u in places:
            rho *= math.exp(inputs.old_logprobs[u].item() - inputs.rollout_logprobs[u].item())
        if kind == "tis":
            weights[t] = min(rho, high)
        elif kind == "icepop":
            weights[t] = rho if low <= rho <= high else 0.0
        else:
            weights[t] = rho if rho <= high else 0.0
        cut += weights[t] != rho
    return weights, cut


def sampler_weights(inputs, kind, high):
    row = find(kinds.CORRECTIONS, kind)
    return row.bind(row.settings(high=high))(inputs)


def with_sampler(inputs, seed, spread):
    rng = torch.Generator().manual_seed(seed)
    noise = spread * torch.randn(len(inputs.mask), generator=rng, dtype=torch.float64)
    return dataclasses.replace(inputs, rollout_logprobs=inputs.old_logprobs + noise)


@pytest.mark.parametrize("kind", ["tis", "mis_token", "mis_sequence", "icepop"])
@settings(derandomize=True)
@given(
    seed=st.integers(0, 2**31),
    num_sequences=st.integers(1, 5),
    spread=st.sampled_from([0.1, 1.0, 3.0]),
    high=st.sampled_from([1.1, 2.0, 5.0]),
)
def test_weights_and_metrics_match_loops(kind, seed, num_sequences, spread, high):
    inputs = with_sampler(random_batch(seed, num_sequences), seed, spread)
    given = sampler_weights(inputs, kind, high)
    weights = given.weights
    expected, cut = slow_weights(inputs, kind, 0.5, high)
    expected = torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(weights, expected, rtol=1e-12, atol=1e-14)
    assert given.clipped.sum().item() == cut
    metrics = mismatch_metrics(given, inputs)
    count = int(inputs.mask.sum())
    total, found = metrics["mismatch/weight_mean"]
    assert total.item() == pytest.approx(expected.sum().item()) and round(found.item()) == count
    assert metrics["mismatch/clipped_fraction"][0].item() == cut


# on-policy tokens (ratio 1): the gradient is -A times weight over the lengths
WEIGHTS = torch.tensor([0.5, 1.5, 0.0, 2.0, 1.0, 1.0], dtype=torch.float64)


def gradient_of(name, weights=WEIGHTS):
    inputs = batch_of([[0.0, 0.0], [0.0] * 4], [2.0, -1.0], [[1.0] * 2, [1.0] * 4])
    inputs = dataclasses.replace(inputs, sampler_weights=weights)
    return loss_and_gradient(LOSSES[name](inputs, default_settings(name)), inputs)[1]


@pytest.mark.parametrize("name", TOKEN_LOSSES)
def test_a_loss_over_tokens_weighs_each(name):
    plain = gradient_of(name, None)
    torch.testing.assert_close(gradient_of(name), plain * WEIGHTS)
    assert plain.abs().min() > 0


@pytest.mark.parametrize("name", SEQUENCE_LOSSES)
def test_a_loss_with_one_ratio_a_sequence_takes_the_mean(name):
    # means 1 and 1, then 0.5 and 1.25
    plain = gradient_of(name, None)
    torch.testing.assert_close(gradient_of(name), plain)
    weights = torch.tensor([0.0, 1.0, 0.0, 2.0, 1.0, 2.0], dtype=torch.float64)
    factors = torch.tensor([0.5] * 2 + [1.25] * 4, dtype=torch.float64)
    torch.testing.assert_close(gradient_of(name, weights), plain * factors)
    assert plain.abs().min() > 0


def test_mistakes_are_refused():
    with pytest.raises(UserError, match="algorithm.mismatch is 'mis' .did you mean"):
        find(kinds.CORRECTIONS, "mis")
    with pytest.raises(ValueError, match="no rollout_logprobs"):
        inputs = dataclasses.replace(batch_of([[0.1]], [1.0]), rollout_logprobs=None)
        sampler_weights(inputs, "tis", 2.0)
