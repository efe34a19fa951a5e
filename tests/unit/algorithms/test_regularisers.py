"""KL penalty, entropy bonus, router penalty: against loops, by hand, over packs."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_rl.algorithms import LOSSES, LossInputs, default_settings
from megatron_rl.algorithms.regularisers import ESTIMATORS, Regularisers, add_regularisers
from tests.support.loss_batches import batch_of, random_batch, take
from tests.support.slow_losses import slow_regularisers

NAMES = sorted(LOSSES)
every_loss = pytest.mark.parametrize("name", NAMES)


def drawn(seed, num_sequences=4, spread=0.5):
    """A ragged batch with a reference, entropies and distances; NaN outside the mask."""
    inputs = random_batch(seed, num_sequences, spread, shift=True)
    rng = torch.Generator().manual_seed(seed + 1)
    size = len(inputs.mask)
    noise = spread * torch.randn(size, generator=rng, dtype=torch.float64)
    entropy, distance = torch.rand(2, size, generator=rng, dtype=torch.float64)
    return dataclasses.replace(
        inputs,
        ref_logprobs=inputs.old_logprobs + noise,
        entropy=torch.where(inputs.mask, entropy, torch.nan).requires_grad_(),
        distance=torch.where(inputs.mask, distance, torch.nan).requires_grad_(),
    )


def run(name, inputs):
    return LOSSES[name](inputs, default_settings(name))


@every_loss
@settings(derandomize=True)
@given(
    seed=st.integers(0, 2**31),
    num_sequences=st.integers(1, 5),
    spread=st.sampled_from([1e-3, 0.3, 1.5]),
    estimator=st.sampled_from(sorted(ESTIMATORS)),
    coefs=st.sampled_from([(0.1, 0, 0), (0, 0.02, 0), (0, 0, 3), (0.3, 0.5, 0.7)]),
)
def test_matches_slow_reference(name, seed, num_sequences, spread, estimator, coefs):
    """loss_sum / denominator of the loss, plus the means over tokens of the loops."""
    inputs = drawn(seed, num_sequences, spread)
    chosen = Regularisers(coefs[0], estimator, *coefs[1:])
    base = run(name, inputs)
    outputs = add_regularisers(base, inputs, chosen)
    assert outputs.denominator is base.denominator
    added = (outputs.loss_sum - base.loss_sum) / base.denominator
    new = inputs.logprobs.detach().clone().requires_grad_()
    entropy = inputs.entropy.detach().clone().requires_grad_()
    distance = inputs.distance.detach().clone().requires_grad_()
    ref, mask = inputs.ref_logprobs.tolist(), inputs.mask.tolist()
    expected = slow_regularisers(new, ref, entropy, mask, estimator, *coefs[:2], distance, coefs[2])
    torch.testing.assert_close(added.detach(), expected.detach(), rtol=1e-9, atol=1e-12)
    if not inputs.mask.any():
        return
    given = [inputs.logprobs, inputs.entropy, inputs.distance]
    found = torch.autograd.grad(added, given, allow_unused=True)
    wanted = torch.autograd.grad(expected, [new, entropy, distance], allow_unused=True)
    for got, want, like in zip(found, wanted, (new, entropy, distance), strict=True):
        got, want = (torch.zeros_like(like) if g is None else g for g in (got, want))
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


@every_loss
def test_packs_add_up_with_the_factor_of_all(name):
    """One pack a sequence, with D / N of the whole batch: the sums and kl_ref are the batch's."""
    chosen = Regularisers(0.2, "k3", 0.1, 0.3)
    for seed in range(20):
        inputs = drawn(seed, 5)
        whole = add_regularisers(run(name, inputs), inputs, chosen)
        factor = whole.denominator / inputs.mask.sum().clamp(min=1e-20)
        parts = []
        for sequence in inputs.sequence_ids.unique():
            places = (inputs.sequence_ids == sequence).nonzero()[:, 0]
            pack = take(inputs, places, torch.zeros_like(places))
            parts.append(add_regularisers(run(name, pack), pack, chosen, factor))
        total = sum(p.loss_sum for p in parts)
        torch.testing.assert_close(total.detach(), whole.loss_sum.detach(), rtol=1e-11, atol=1e-12)
        for index in (0, 1):
            torch.testing.assert_close(
                sum(p.metrics["kl_ref"][index] for p in parts), whole.metrics["kl_ref"][index]
            )


def test_by_hand():
    # log r = log ref - log new = ln 2, 0 | -ln 2;  k3: 1 - ln 2, 0, ln 2 - 1/2
    log2 = math.log(2)
    inputs = dataclasses.replace(
        batch_of([[0.0, 0.0], [0.0]], [0.0, 0.0]),
        ref_logprobs=torch.tensor([log2 - 1, -1.0, -log2 - 1], dtype=torch.float64),
        entropy=torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64),
        distance=torch.tensor([0.5, 0.0, 0.25], dtype=torch.float64, requires_grad=True),
    )
    means = {"k1": 0.0, "k2": log2**2 / 3, "k3": 0.5 / 3}
    slopes = {"k1": [1, 1, 1], "k2": [-log2, 0, log2], "k3": [-1, 0, 0.5]}
    for estimator, mean in means.items():
        chosen = Regularisers(0.5, estimator, 0.1, 4.0)
        outputs = add_regularisers(run("grpo", inputs), inputs, chosen)
        loss = outputs.loss_sum / outputs.denominator  # of 2 sequences
        assert loss.item() == pytest.approx(0.5 * mean - 0.1 * 2.0 + 4.0 * 0.25)
        gradient, of_distance = torch.autograd.grad(loss, [inputs.logprobs, inputs.distance])
        assert of_distance.tolist() == pytest.approx([4 / 3] * 3)
        assert gradient.tolist() == pytest.approx([0.5 * s / 3 for s in slopes[estimator]])
        total, count = outputs.metrics["kl_ref"]
        assert (total / count).item() == pytest.approx(0.5 / 3)


@every_loss
def test_coefficients_of_zero_change_nothing(name):
    inputs = drawn(1)
    base = run(name, inputs)
    outputs = add_regularisers(base, inputs, Regularisers())
    assert outputs.loss_sum is base.loss_sum and outputs.denominator is base.denominator
    assert set(outputs.metrics) - set(base.metrics) == {"kl_ref"}
    bare = dataclasses.replace(inputs, ref_logprobs=None, entropy=None, distance=None)
    assert (
        add_regularisers(run(name, bare), bare, Regularisers()).metrics == run(name, bare).metrics
    )


@every_loss
def test_nothing_trained_gives_an_attached_zero(name):
    nan = torch.full((3,), torch.nan)
    inputs = LossInputs(
        logprobs=nan.clone().requires_grad_(),
        old_logprobs=nan,
        advantages=nan,
        mask=torch.zeros(3, dtype=torch.bool),
        sequence_ids=torch.zeros(3, dtype=torch.long),
        router_shift=nan,
        rollout_logprobs=nan,
        ref_logprobs=nan,
        entropy=nan.clone().requires_grad_(),
        distance=nan.clone().requires_grad_(),
    )
    chosen = Regularisers(1.0, "k3", 1.0, 1.0)
    for factor in (None, torch.tensor(0.25, dtype=torch.float64)):
        outputs = add_regularisers(run(name, inputs), inputs, chosen, factor)
        assert outputs.loss_sum.dtype == torch.float32
        outputs.loss_sum.backward()
        assert outputs.loss_sum.item() == 0.0
        for leaf in (inputs.logprobs, inputs.entropy, inputs.distance):
            assert leaf.grad.tolist() == [0.0] * 3


def test_the_reference_gets_no_gradient():
    inputs = drawn(2)
    inputs.ref_logprobs.requires_grad_()
    add_regularisers(run("gmpo", inputs), inputs, Regularisers(1.0, "k2")).loss_sum.backward()
    assert inputs.ref_logprobs.grad is None and inputs.logprobs.grad is not None


def test_mistakes_are_refused():
    inputs = batch_of([[0.1]], [1.0])
    outputs = run("grpo", inputs)
    with pytest.raises(ValueError, match="found no ref_logprobs"):
        add_regularisers(outputs, inputs, Regularisers(kl_coef=0.1))
    with pytest.raises(ValueError, match="found no entropy"):
        add_regularisers(outputs, inputs, Regularisers(entropy_coef=0.1))
    with pytest.raises(ValueError, match="found no distance .* set shift_coef to 0"):
        add_regularisers(outputs, inputs, Regularisers(shift_coef=0.1))
    with pytest.raises(ValueError, match="unknown KL estimator 'k4'"):
        Regularisers(kl_estimator="k4")
