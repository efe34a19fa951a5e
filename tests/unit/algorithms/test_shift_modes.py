"""Where gamma~ enters: every mode of every loss against the slow reference, and by hand."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_rl.algorithms import LOSSES, default_settings, make_settings
from megatron_rl.algorithms.aggregate import EMPTY
from megatron_rl.algorithms.interface import SHIFT_MODES
from megatron_rl.algorithms.router_shift import (
    acting_sum,
    normalise_shift,
    shift_distance,
    shift_weight,
)
from megatron_rl.algorithms.shift_modes import clip_bounds
from tests.support.loss_batches import (
    batch_of,
    loss_and_gradient,
    random_batch,
    slow_value_and_gradient,
    take,
)
from tests.support.slow_losses import slow_loss

GEOMETRIC = ("gspo", "gmpo", "rspo", "rspo_v1")
CASES = [
    (name, mode)
    for name in sorted(LOSSES)
    for mode in SHIFT_MODES
    if mode != "token_weight" or name in GEOMETRIC
]
every_case = pytest.mark.parametrize("name, mode", CASES)
BASE = {"rspo": "gmpo", "rspo_v1": "gmpo"}
ragged = {
    "seed": st.integers(0, 2**31),
    "num_sequences": st.integers(1, 5),
    "spread": st.sampled_from([1e-4, 0.1, 0.5, 1.5]),
    "above_one": st.booleans(),
    "weighed": st.booleans(),
}


def run(name, inputs):
    return LOSSES[name](inputs, default_settings(name))


def drawn(seed, num_sequences, spread, above_one, weighed, mode):
    """A ragged batch in a mode; gamma~ up to 1.2 as after normalising; weights with zeros."""
    inputs = random_batch(seed, num_sequences, spread, shift=True)
    gamma = inputs.router_shift * (1.2 if above_one else 1.0)
    weights = None
    if weighed:
        rng = torch.Generator().manual_seed(seed)
        weights = 2 * torch.rand(len(inputs.mask), generator=rng, dtype=torch.float64)
        weights = torch.where(weights < 0.5, 0.0, weights)
        weights = torch.where(inputs.mask, weights, torch.nan)
    return dataclasses.replace(inputs, router_shift=gamma, shift_mode=mode, sampler_weights=weights)


@every_case
@settings(derandomize=True)
@given(**ragged)
def test_matches_slow_reference(name, mode, seed, num_sequences, spread, above_one, weighed):
    inputs = drawn(seed, num_sequences, spread, above_one, weighed, mode)
    outputs = run(name, inputs)
    total, count, expected = slow_value_and_gradient(name, inputs, default_settings(name))
    torch.testing.assert_close(outputs.loss_sum.detach(), total, rtol=1e-10, atol=1e-12)
    assert outputs.denominator.item() == (count or EMPTY)
    (gradient,) = torch.autograd.grad(outputs.loss_sum, inputs.logprobs)
    torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-12)


@every_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ones_are_the_base_loss_bit_for_bit(name, mode, dtype):
    """gamma~ = 1 and sampler weights of 1: value, gradient and metrics."""
    for seed in range(10):
        inputs = random_batch(seed, num_sequences=5, spread=0.5, dtype=dtype)
        ones = torch.ones_like(inputs.old_logprobs)
        same = dataclasses.replace(inputs, router_shift=ones, shift_mode=mode, sampler_weights=ones)
        base, outputs = run(BASE.get(name, name), inputs), run(name, same)
        for found, expected in zip(
            loss_and_gradient(outputs, same), loss_and_gradient(base, inputs), strict=True
        ):
            assert torch.equal(found, expected)
        for key, pair in base.metrics.items():
            assert torch.equal(outputs.metrics[key][0], pair[0]), key


@every_case
@pytest.mark.parametrize("log_ratio", [-200.0, -50.0, 50.0, 200.0])
@pytest.mark.parametrize("advantage", [-2.0, 2.0])
def test_extremes_stay_finite_in_float32(name, mode, log_ratio, advantage):
    inputs = batch_of([[log_ratio, 0.1], [log_ratio]], [advantage] * 2, [[0.0, 1.0], [0.0]])
    inputs = take(inputs, torch.arange(3))
    floats = {
        key: value.float().detach()
        for key, value in vars(inputs).items()
        if isinstance(value, torch.Tensor) and value.dtype == torch.float64
    }
    inputs = dataclasses.replace(inputs, **floats, shift_mode=mode)
    inputs.logprobs.requires_grad_()
    loss, gradient = loss_and_gradient(run(name, inputs), inputs)
    assert loss.dtype == torch.float32
    assert torch.isfinite(loss) and torch.isfinite(gradient).all()


@every_case
def test_packs_add_up_to_the_whole(name, mode):
    for seed in range(20):
        inputs = drawn(seed, 5, 0.5, True, True, mode)
        whole = run(name, inputs)
        parts = []
        for sequence in inputs.sequence_ids.unique():
            places = (inputs.sequence_ids == sequence).nonzero()[:, 0]
            parts.append(run(name, take(inputs, places, torch.zeros_like(places))))
        torch.testing.assert_close(
            sum(p.loss_sum for p in parts).detach(), whole.loss_sum.detach(), rtol=1e-11, atol=1e-13
        )


@every_case
def test_no_gradient_through_gamma_or_the_sampler_weights(name, mode):
    inputs = dataclasses.replace(
        batch_of([[0.05, -0.02], [0.01]], [1.0, -0.5], [[0.9, 1.0], [0.95]]), shift_mode=mode
    )
    weights = torch.tensor([1.0, 0.5, 2.0], dtype=torch.float64, requires_grad=True)
    inputs = dataclasses.replace(inputs, sampler_weights=weights)
    inputs.router_shift.requires_grad_()
    run(name, inputs).loss_sum.backward()
    assert weights.grad is None and inputs.router_shift.grad is None
    assert inputs.logprobs.grad is not None


LOG2, LOG15 = math.log(2), math.log(1.5)
RATIOS = [[LOG15, -LOG2], [LOG2, -LOG2, 0.0, 0.0]]
ADVANTAGES = [2.0, -1.0]
GAMMAS = [[0.5, 1.0], [0.5, 1.0, 0.5, 1.0]]


def by_hand(name, mode, ratios=RATIOS, gammas=GAMMAS, **overrides):
    inputs = dataclasses.replace(batch_of(ratios, ADVANTAGES, gammas), shift_mode=mode)
    outputs = LOSSES[name](inputs, make_settings(name, overrides))
    loss, gradient = loss_and_gradient(outputs, inputs)
    return outputs, loss.item(), gradient.tolist()


def test_range_of_grpo_by_hand():
    # bounds 0.9..1.1, 0.8..1.2 | 0.9..1.1, 0.8..1.2, ...;  J: 2*1.1, 2*0.5 | -2, -0.8, -1, -1
    outputs, loss, gradient = by_hand("grpo", "range")
    assert loss == pytest.approx(-(1.6 - 1.2) / 2)
    assert gradient == pytest.approx([0, -0.25, 0.25, 0, 0.125, 0.125])
    total, count = outputs.metrics["clip_fraction"]
    assert (total / count).item() == pytest.approx(2 / 6)
    # the ratio 1.15 is inside the range of gamma 1 and outside that of gamma 0.5
    inside = [[math.log(1.15), math.log(1.15)], [0.0]]
    _, _, gradient = by_hand("grpo", "range", inside, [[0.5, 1.0], [1.0]])
    assert gradient == pytest.approx([0, -1.15 / 2, 0.5])


def test_range_of_gmpo_by_hand():
    # A > 0: ln 1.5 -> 0.2;  A < 0: -ln 2 -> -0.4;  and both rspo are the same
    for name in ("gmpo", "rspo", "rspo_v1"):
        _, loss, gradient = by_hand(name, "range")
        g0, g1 = math.exp((0.2 - LOG2) / 2), math.exp((LOG2 - 0.4) / 4)
        assert loss == pytest.approx(-(2 * g0 - g1) / 2)
        assert gradient == pytest.approx([0, -g0 / 2, g1 / 8, 0, g1 / 8, g1 / 8])


def test_range_of_gspo_is_that_of_the_mean_gamma():
    # s_0 = exp(3e-4), mean gamma 0.75: the bound 1 + 4e-4 * 0.75 = 1.0003 is below it, that of
    # gamma 1 is not
    ratios = [[3e-4, 3.0003e-4], [0.0]]
    outputs, loss, gradient = by_hand("gspo", "range", ratios, [[0.5, 1.0], [1.0]])
    assert loss == pytest.approx(-(2 * 1.0003 - 1) / 2, abs=1e-12)
    assert gradient == pytest.approx([0, 0, 0.5])
    _, _, gradient = by_hand("gspo", "range", ratios, [[1.0, 1.0], [1.0]])
    assert gradient[0] != 0


def test_token_weights_by_hand():
    # gspo: s_0 = exp((0.5 ln 1.5 - ln 2) / 1.5), s_1 = exp((0.5 ln 2 - ln 2) / 3)
    _, loss, gradient = by_hand("gspo", "token_weight", clip_low=0.9, clip_high=9.0)
    s0, s1 = math.exp((LOG15 / 2 - LOG2) / 1.5), math.exp(-LOG2 / 6)
    assert loss == pytest.approx(-(2 * s0 - s1) / 2)
    # A s g_t / sum g / 2: the shifted tokens get half the gradient of the others
    expected = [-s0 / 3, -2 * s0 / 3, s1 / 12, s1 / 6, s1 / 12, s1 / 6]
    assert gradient == pytest.approx(expected)
    _, _, gradient = by_hand("rspo", "token_weight", clip_low=9.0, clip_high=9.0)
    assert gradient == pytest.approx(expected)


def test_negative_only_by_hand():
    # A > 0 as without gamma; A < 0 as with it: w~ 1, 0.5 -> 0.8, 0.5 -> 0.8, 1
    _, loss, gradient = by_hand("grpo", "negative_only")
    assert loss == pytest.approx(-(1.7 - 0.9) / 2)
    assert gradient == pytest.approx([0, -0.25, 0.125, 0, 0, 0.125])
    negative = by_hand("rspo", "negative_only")[2]
    assert negative[:2] == pytest.approx(by_hand("gmpo", "ratio", gammas=None)[2][:2])
    assert negative[2:] == pytest.approx(by_hand("rspo", "ratio")[2][2:])


def test_range_of_sapo_narrows_the_gate():
    # at w = 1 the weight stays 1; at w = 2 it is 4 p (1 - p) w with p = sigmoid(tau / gamma)
    _, _, gradient = by_hand("sapo", "range", [[0.0, LOG2], [0.0]], [[0.5, 0.5], [0.5]])
    p = 1 / (1 + math.exp(-2.0))
    assert gradient == pytest.approx([-2 / 4, -2 * 4 * p * (1 - p) * 2 / 4, 0.5])


def test_bounds():
    assert clip_bounds(1.0, 0.2, 0.28, None) == (0.8, 1.28)
    low, high = clip_bounds(0.0, 0.4, math.inf, torch.tensor([1.0, 0.5, 0.0]))
    assert low.tolist() == pytest.approx([-0.4, -0.2, 0.0])
    assert high.tolist() == [math.inf] * 3
    low, _ = clip_bounds(1.0, 0.2, 0.2, torch.tensor([1.0]))
    assert torch.equal(low, torch.tensor([1 - 0.2]))


@pytest.mark.parametrize("name", sorted(set(LOSSES) - set(GEOMETRIC)))
def test_token_weights_need_a_geometric_mean(name):
    inputs = dataclasses.replace(batch_of([[0.1]], [1.0], [[0.9]]), shift_mode="token_weight")
    with pytest.raises(ValueError, match="token_weight in a loss over tokens"):
        run(name, inputs)


def test_unknown_mode():
    with pytest.raises(ValueError, match="found shift_mode 'ratios'"):
        dataclasses.replace(batch_of([[0.1]], [1.0]), shift_mode="ratios")


def test_the_batch_mean_by_hand():
    weight = torch.tensor([0.9, 0.8, 1.0, 0.5, 0.1])
    advantages = torch.tensor([1.0, -1.0, 0.0, -2.0, -1.0])
    mask = torch.tensor([True, True, True, True, False])
    total, count = acting_sum(weight, advantages, mask, "ratio")
    assert (total / count).item() == pytest.approx(0.8)
    normal = normalise_shift(weight, total / count)
    assert normal.tolist() == pytest.approx([1.125, 1.0, 1.25, 0.625, 0.125])
    total, count = acting_sum(weight, advantages, mask, "negative_only")
    assert [total.item(), count.item()] == pytest.approx([1.3, 2.0])
    # packs add up, and one without an acting token adds nothing
    halves = [
        acting_sum(weight[i], advantages[i], mask[i], "ratio") for i in (slice(2), slice(2, 5))
    ]
    assert sum(h[0] for h in halves).item() == pytest.approx(3.2)
    total, count = acting_sum(weight, advantages, torch.zeros(5, dtype=torch.bool), "ratio")
    assert normalise_shift(weight, total / count).isfinite().all()


def test_normalising_unmoved_routers_changes_no_bit():
    weight = shift_weight(torch.zeros(7), 3, 0.8)
    total, count = acting_sum(weight, torch.ones(7), torch.ones(7), "ratio")
    assert torch.equal(normalise_shift(weight, total / count), torch.ones(7))


def test_the_maximum_over_layers():
    rng = torch.Generator().manual_seed(0)
    new, old = torch.randn(2, 5, 4, 3, generator=rng, dtype=torch.float64)
    slow = [
        max(
            sum(abs(new[t, layer, k] - old[t, layer, k]).item() for k in range(3)) / 3
            for layer in range(4)
        )
        for t in range(5)
    ]
    whole = shift_distance(new, old, "max")
    torch.testing.assert_close(whole, torch.tensor(slow, dtype=torch.float64))
    stages = [shift_distance(new[:, part], old[:, part], "max") for part in (slice(1), slice(1, 4))]
    assert torch.equal(torch.maximum(*stages), whole)
    assert shift_distance(new[:, :0], old[:, :0], "max").tolist() == [0.0] * 5
    weight = shift_weight(whole, 1, 0.0)
    torch.testing.assert_close(weight, torch.exp(-whole))
    with pytest.raises(ValueError, match="found layers 'median'"):
        shift_distance(new, old, "median")


ATTACHED = [(name, mode) for name, mode in CASES if name not in ("cispo", "dppo_tv", "dppo_kl")]


def slow_at(name, inputs, change):
    """The slow reference's loss with gamma~ + change."""
    return slow_loss(
        name,
        inputs.logprobs.detach(),
        inputs.old_logprobs.tolist(),
        inputs.advantages.tolist(),
        inputs.mask.tolist(),
        inputs.sequence_ids.tolist(),
        default_settings(name).model_dump(),
        (inputs.router_shift.detach() + change).tolist(),
        inputs.shift_mode,
        inputs.sampler_weights.tolist(),
        inputs.rollout_logprobs.tolist(),
    )[0].item()


@pytest.mark.parametrize("name, mode", ATTACHED)
def test_the_gradient_through_an_attached_gamma(name, mode):
    """In a random direction, against differences of the slow reference's loss."""
    steepest = 0.0
    for seed in range(20):
        inputs = drawn(seed, 4, 0.3, False, True, mode)
        inputs = dataclasses.replace(inputs, shift_attached=True)
        gamma = inputs.router_shift.requires_grad_()
        outputs = run(name, inputs)
        assert outputs.metrics["router/gamma_mean"][0].requires_grad is False
        (gradient,) = torch.autograd.grad(
            outputs.loss_sum, gamma, allow_unused=True, materialize_grads=True
        )
        assert torch.equal(gradient[~inputs.mask], torch.zeros_like(gradient[~inputs.mask]))
        rng = torch.Generator().manual_seed(seed)
        step = torch.randn(len(gamma), generator=rng, dtype=torch.float64)

        rise = [slow_at(name, inputs, size * step) for size in (1e-6, -1e-6)]
        slope = (rise[0] - rise[1]) / 2e-6
        found = (gradient * step)[inputs.mask].sum().item()
        assert found == pytest.approx(slope, rel=1e-5, abs=1e-7)
        steepest = max(steepest, abs(slope))
    assert steepest > (1e-8 if name == "gspo" and mode == "range" else 1e-4)
