"""Effective sample size and variance of the weights: by hand, against loops, in parts."""

from __future__ import annotations

import dataclasses
import math
import statistics

import pytest
import torch

from megatron_rl.algorithms.weight_spread import KINDS, spread_metrics, weight_sums
from tests.support.loss_batches import batch_of, random_batch, take


def test_by_hand():
    # tokens 2, 1, 1, 4; answers 2 (sqrt 2), 4 (2)
    inputs = batch_of([[math.log(2), 0.0], [0.0, math.log(4)]], [1.0, -1.0])
    found = spread_metrics(weight_sums(inputs))
    root = math.sqrt(2)
    assert found == pytest.approx(
        {
            "weights/ess_token": 8**2 / (4 * 22),
            "weights/variance_token": 22 / 4 - 4,
            "weights/ess_sequence": 6**2 / (2 * 20),
            "weights/variance_sequence": 1.0,
            "weights/ess_geometric": (2 + root) ** 2 / (2 * 6),
            "weights/variance_geometric": ((2 - root) / 2) ** 2,
        }
    )


def test_the_weights_are_to_the_sampler():
    inputs = batch_of([[math.log(2), 0.0]], [1.0])
    inputs = dataclasses.replace(inputs, rollout_logprobs=inputs.logprobs.detach())
    found = spread_metrics(weight_sums(inputs))
    assert found["weights/ess_token"] == 1 and found["weights/variance_token"] == 0
    old = dataclasses.replace(inputs, rollout_logprobs=None)
    assert spread_metrics(weight_sums(old))["weights/ess_token"] == pytest.approx(9 / 10)


def slow(inputs):
    weights = {kind: [] for kind in KINDS}
    for sequence in sorted(set(inputs.sequence_ids.tolist())):
        own = [
            math.exp(inputs.logprobs[t].item() - inputs.rollout_logprobs[t].item())
            for t in range(len(inputs.mask))
            if inputs.mask[t] and inputs.sequence_ids[t] == sequence
        ]
        if own:
            weights["token"] += own
            weights["sequence"].append(math.prod(own))
            weights["geometric"].append(math.prod(own) ** (1 / len(own)))
    metrics = {}
    for kind, values in weights.items():
        if values:
            squares = sum(w * w for w in values)
            metrics[f"weights/ess_{kind}"] = sum(values) ** 2 / (len(values) * squares)
            metrics[f"weights/variance_{kind}"] = statistics.pvariance(values)
    return metrics


def test_200_ragged_batches_whole_and_in_parts():
    """Parts, as packs and ranks have them, some of them several times as often."""
    for seed in range(200):
        inputs = random_batch(seed, 1 + seed % 6, [1e-3, 0.3, 1.5][seed % 3])
        expected = slow(inputs)
        sums = weight_sums(inputs)
        assert spread_metrics(sums) == pytest.approx(expected, rel=1e-9, abs=1e-15)
        parts = [
            weight_sums(take(inputs, places, torch.zeros_like(places)))
            for places in (
                (inputs.sequence_ids == sequence).nonzero()[:, 0]
                for sequence in inputs.sequence_ids.unique()
            )
        ]
        assert spread_metrics(4 * sum(parts)) == pytest.approx(expected, rel=1e-9, abs=1e-15)


def test_weights_near_one_keep_their_variance_in_float32():
    x = 1e-4 * torch.randn(1000, generator=torch.Generator().manual_seed(1))
    inputs = batch_of([x.tolist()], [1.0])
    single = dataclasses.replace(
        take(inputs, torch.arange(1000)),
        logprobs=x.requires_grad_(),
        rollout_logprobs=torch.zeros(1000),
    )
    expected = statistics.pvariance([math.exp(v) for v in x.tolist()])
    found = spread_metrics(weight_sums(single))["weights/variance_token"]
    assert found == pytest.approx(expected, rel=1e-5)


def test_weights_near_zero_keep_their_size_and_variance():
    inputs = batch_of([[math.log(1e-7)], [math.log(3e-7)]], [1.0, 1.0])
    found = spread_metrics(weight_sums(inputs))
    assert found["weights/ess_sequence"] == pytest.approx(4**2 / (2 * 10), rel=1e-6)
    assert found["weights/variance_sequence"] == pytest.approx(1e-14, rel=1e-5, abs=0)


def test_extremes_are_finite_and_nothing_gives_nothing():
    far = batch_of([[400.0, 400.0], [-900.0]], [1.0, 1.0])
    found = spread_metrics(weight_sums(far))
    assert all(math.isfinite(value) for value in found.values())
    assert found["weights/ess_sequence"] == pytest.approx(0.5)
    lost = spread_metrics(weight_sums(batch_of([[-900.0]], [1.0])))
    assert 0 < lost["weights/ess_token"] <= 1
    none = dataclasses.replace(far, mask=torch.zeros(3, dtype=torch.bool))
    assert spread_metrics(weight_sums(none)) == {}
