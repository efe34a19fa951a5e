"""Aggregation, clipping, KL estimates and the settings."""

from __future__ import annotations

import math

import pytest
import torch
from pydantic import ValidationError

from megatron_rl.algorithms import LOSSES, LossInputs, default_settings, make_settings
from megatron_rl.algorithms.aggregate import (
    EMPTY,
    make_segments,
    over_constant_length,
    over_sequence_means,
    over_sequences,
    over_tokens,
    sequence_mean,
    sequence_sum,
)
from megatron_rl.algorithms.clipping import is_clipped, pessimistic_clip
from megatron_rl.algorithms.kl import k1, k2, k3
from megatron_rl.errors import UserError

MASK = torch.tensor([True, True, False, True, False, False])
IDS = torch.tensor([0, 0, 0, 1, 2, 3])  # sequence 2 has no trained token, 3 is padding
VALUES = torch.tensor([1.0, 3.0, torch.nan, 5.0, torch.inf, torch.nan])


@pytest.mark.parametrize("num_sequences", [3, None])
def test_aggregate_by_hand(num_sequences) -> None:
    segments = make_segments(MASK, IDS, num_sequences)
    size = 4 if num_sequences else 7
    zeros = [0.0] * (size - 2)
    assert segments.lengths.tolist() == [2, 1, *zeros]
    assert sequence_sum(VALUES, segments).tolist() == [4, 5, *zeros]
    assert sequence_mean(VALUES, segments).tolist() == [2, 5, *zeros]
    assert [v.item() for v in over_tokens(VALUES, segments)] == [9, 3]
    assert [v.item() for v in over_sequences(torch.ones(size), segments)] == [2, 2]
    assert [v.item() for v in over_sequence_means(VALUES, segments)] == [7, 2]
    assert [v.item() for v in over_constant_length(VALUES, segments, 10)] == pytest.approx([0.9, 2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_empty_count_vanishes_beside_a_real_one(dtype) -> None:
    one, empty = torch.ones((), dtype=dtype), torch.tensor(EMPTY, dtype=dtype)
    assert (one + 1000 * empty).item() == 1.0
    assert (torch.zeros((), dtype=dtype) / empty).item() == 0.0


def test_clip_is_ppos_minimum() -> None:
    rng = torch.Generator().manual_seed(0)
    ratio = (torch.randn(200, generator=rng, dtype=torch.float64) * 0.5).exp()
    advantages = torch.randn(200, generator=rng, dtype=torch.float64)
    mine = advantages * pessimistic_clip(ratio, advantages, 0.8, 1.28)
    ppo = torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.28) * advantages)
    torch.testing.assert_close(mine, ppo, rtol=0, atol=0)
    cut = ppo != ratio * advantages
    assert torch.equal(is_clipped(ratio, advantages, 0.8, 1.28), cut)
    assert 0 < cut.sum() < 200


def test_clip_by_hand() -> None:
    x = torch.tensor([0.5, -0.5, 0.5, -0.5, 0.4, -0.4], requires_grad=True)
    signs = torch.tensor([1.0, 1.0, -1.0, -1.0, 1.0, -1.0])
    clipped = pessimistic_clip(x, signs, -0.4, 0.4)
    assert clipped.tolist() == pytest.approx([0.4, -0.5, 0.5, -0.4, 0.4, -0.4])
    clipped.sum().backward()
    assert x.grad.tolist() == [0, 1, 1, 0, 1, 1]


def test_kl_by_hand() -> None:
    p, q = torch.tensor([-1.0, -1.0]), torch.tensor([-1.0 + math.log(2), -1.0])
    assert k1(p, q).tolist() == pytest.approx([-math.log(2), 0])
    assert k2(p, q).tolist() == pytest.approx([math.log(2) ** 2 / 2, 0])
    assert k3(p, q).tolist() == pytest.approx([1 - math.log(2), 0])


@pytest.mark.parametrize("estimate", [k1, k3])
def test_kl_is_unbiased(estimate) -> None:
    """Expectation under p over a whole vocabulary, not a sample."""
    rng = torch.Generator().manual_seed(1)
    p = torch.randn(7, generator=rng, dtype=torch.float64).log_softmax(0)
    q = torch.randn(7, generator=rng, dtype=torch.float64).log_softmax(0)
    exact = (p.exp() * (p - q)).sum()
    torch.testing.assert_close((p.exp() * estimate(p, q)).sum(), exact)


@pytest.mark.parametrize("name", LOSSES)
def test_losses_never_wait_for_the_device(name) -> None:
    """On the meta device there are no values: to read one, or a shape made of one, raises."""
    floats = {
        key: torch.zeros(6, device="meta")
        for key in ("logprobs", "old_logprobs", "advantages", "router_shift", "rollout_logprobs")
    }
    floats["logprobs"].requires_grad_()
    inputs = LossInputs(
        **floats,
        mask=torch.ones(6, dtype=torch.bool, device="meta"),
        sequence_ids=torch.zeros(6, dtype=torch.long, device="meta"),
    )
    outputs = LOSSES[name](inputs, default_settings(name))
    (outputs.loss_sum / outputs.denominator).backward()
    assert inputs.logprobs.grad.shape == (6,)
    with pytest.raises((RuntimeError, NotImplementedError)):
        outputs.loss_sum.item()


def test_settings_are_overridden_and_frozen() -> None:
    made = make_settings("grpo", {"clip_high": 0.3})
    assert (made.clip_low, made.clip_high) == (0.2, 0.3)
    assert make_settings("dr_grpo", {"length_divisor": 512}).length_divisor == 512
    assert make_settings("gmpo", {"clip_high": math.inf}).clip_high == math.inf
    with pytest.raises(ValidationError, match="frozen"):
        made.clip_low = 1.0


@pytest.mark.parametrize(
    "name, overrides, message",
    [
        ("gropo", {}, "algorithm.name is 'gropo' .did you mean grpo"),
        ("grpo", {"clip_hihg": 0.3}, "clip_hihg is no setting of the loss grpo .did you mean clip"),
        ("sapo", {"clip_low": 0.3}, "expected one of tau_positive, tau_negative"),
        ("grpo", {"clip_low": "3e-4"}, "clip_low is '3e-4'; expected a number, above 0 .*; YAML"),
        ("grpo", {"clip_low": True}, "clip_low is True"),
        ("grpo", {"clip_low": None}, "clip_low is None"),
        ("grpo", {"clip_low": -0.2}, "clip_low is -0.2; expected a number, above 0"),
        ("grpo", {"clip_low": math.nan}, "clip_low is nan; expected a number, above 0"),
        ("sapo", {"tau_negative": math.inf}, "expected a finite number, above 0"),
        ("dr_grpo", {"length_divisor": 0}, "length_divisor is 0; expected"),
    ],
)
def test_wrong_settings_are_refused(name, overrides, message) -> None:
    with pytest.raises(UserError, match=message):
        make_settings(name, overrides)
