"""The losses against the slow references, and what must hold for all of them."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_rl.algorithms import LOSSES, LossInputs, default_settings
from megatron_rl.algorithms.aggregate import EMPTY
from tests.support.loss_batches import (
    batch_of,
    loss_and_gradient,
    random_batch,
    slow_value_and_gradient,
    take,
)

NAMES = sorted(LOSSES)
NEED_SHIFT = ("rspo", "rspo_v1")
NO_CLIP = ("sapo", "drpo")
every_loss = pytest.mark.parametrize("name", NAMES)
ragged = {
    "seed": st.integers(0, 2**31),
    "num_sequences": st.integers(1, 5),
    "spread": st.sampled_from([1e-4, 0.1, 0.5, 1.5]),
    "shift": st.booleans(),
}


def run(name: str, inputs: LossInputs):
    return LOSSES[name](inputs, default_settings(name))


def test_names() -> None:
    names = "grpo dr_grpo dapo gspo gmpo cispo sapo dppo_tv dppo_kl drpo rspo rspo_v1"
    assert " ".join(LOSSES) == names


@every_loss
def test_clipped_tokens_add_up_to_the_clip_fraction(name) -> None:
    """Tokens one by one; gspo clips sequences, and then all their tokens are marked."""
    active = 0
    for seed in range(6):
        inputs = random_batch(seed, 5, 1.5, name in NEED_SHIFT)
        outputs = run(name, inputs)
        if name in NO_CLIP:
            assert outputs.clipped is None
            continue
        assert outputs.clipped.dtype == torch.bool and outputs.clipped.shape == inputs.mask.shape
        marked = (outputs.clipped & inputs.mask.bool()).tolist()
        if name == "gspo":
            ids = inputs.sequence_ids.tolist()
            marks = {i: m for i, m, t in zip(ids, marked, inputs.mask.tolist()) if t}
            assert all(m == marks[i] for i, m, t in zip(ids, marked, inputs.mask.tolist()) if t)
            marked = list(marks.values())
        assert sum(marked) == outputs.metrics["clip_fraction"][0].item()
        active += sum(marked)
    assert active > 0 or name in NO_CLIP


@every_loss
@settings(derandomize=True)
@given(**ragged)
def test_matches_slow_reference(name, seed, num_sequences, spread, shift) -> None:
    inputs = random_batch(seed, num_sequences, spread, shift or name in NEED_SHIFT)
    outputs = run(name, inputs)
    total, count, expected = slow_value_and_gradient(name, inputs, default_settings(name))
    torch.testing.assert_close(outputs.loss_sum.detach(), total, rtol=1e-10, atol=1e-12)
    assert outputs.denominator.item() == (count or EMPTY)
    (gradient,) = torch.autograd.grad(outputs.loss_sum, inputs.logprobs)
    torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-12)


@every_loss
@settings(max_examples=15, derandomize=True)
@given(**ragged)
def test_packs_add_up_to_the_whole(name, seed, num_sequences, spread, shift) -> None:
    """Sums, counts and metrics of one pack per sequence, and one of padding, add to the batch's."""
    inputs = random_batch(seed, num_sequences, spread, shift or name in NEED_SHIFT)
    whole = run(name, inputs)
    loss, gradient = loss_and_gradient(whole, inputs)
    sums, packs = [], []
    for sequence in inputs.sequence_ids.unique():
        places = (inputs.sequence_ids == sequence).nonzero()[:, 0]
        pack = take(inputs, places, torch.zeros_like(places))
        outputs = run(name, pack)
        packs.append((pack, places))
        sums.append(outputs)
    denominator = sum(o.denominator for o in sums)
    total = sum(o.loss_sum for o in sums)
    torch.testing.assert_close((total / denominator).detach(), loss, rtol=1e-11, atol=1e-13)
    (total / denominator).backward()
    rebuilt = torch.zeros_like(gradient)
    for pack, places in packs:
        rebuilt[places] = pack.logprobs.grad
    torch.testing.assert_close(rebuilt, gradient, rtol=1e-11, atol=1e-13)
    for key, (value, count) in whole.metrics.items():
        torch.testing.assert_close(sum(o.metrics[key][0] for o in sums), value)
        torch.testing.assert_close(sum(o.metrics[key][1] for o in sums), count)


@every_loss
@settings(max_examples=15, derandomize=True)
@given(**ragged)
def test_order_of_tokens_and_names_of_sequences_do_not_matter(
    name, seed, num_sequences, spread, shift
) -> None:
    inputs = random_batch(seed, num_sequences, spread, shift or name in NEED_SHIFT)
    loss, gradient = loss_and_gradient(run(name, inputs), inputs)
    order = torch.randperm(len(inputs.mask), generator=torch.Generator().manual_seed(seed))
    names = torch.arange(num_sequences + 1)
    names[:num_sequences] = names[:num_sequences].flip(0)
    shuffled = take(inputs, order, names[inputs.sequence_ids[order]])
    shuffled = dataclasses.replace(shuffled, num_sequences=num_sequences)
    other_loss, other_gradient = loss_and_gradient(run(name, shuffled), shuffled)
    torch.testing.assert_close(other_loss, loss, rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(other_gradient, gradient[order], rtol=1e-11, atol=1e-13)


BASES = [(name, name) for name in NAMES if name not in NEED_SHIFT]
BASES += [("gmpo", "rspo"), ("gmpo", "rspo_v1")]


@pytest.mark.parametrize("base, shifted", BASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gamma_one_is_the_base_loss_bit_for_bit(base, shifted, dtype) -> None:
    for seed in range(10):
        inputs = random_batch(seed, num_sequences=5, spread=0.5, dtype=dtype)
        ones = dataclasses.replace(inputs, router_shift=torch.ones_like(inputs.old_logprobs))
        loss, gradient = loss_and_gradient(run(base, inputs), inputs)
        other_loss, other_gradient = loss_and_gradient(run(shifted, ones), ones)
        assert torch.equal(loss, other_loss)
        assert torch.equal(gradient, other_gradient)


@every_loss
def test_gamma_below_one_changes_the_loss(name) -> None:
    inputs = batch_of([[0.05, -0.02], [0.01]], [1.0, -0.5], [[1.0, 1.0], [1.0]])
    shifted = batch_of([[0.05, -0.02], [0.01]], [1.0, -0.5], [[0.9, 1.0], [0.95]])
    assert run(name, inputs).loss_sum.item() != run(name, shifted).loss_sum.item()
    gamma_sum, count = run(name, shifted).metrics["router/gamma_mean"]
    assert gamma_sum.item() == pytest.approx(2.85) and count.item() == 3


@every_loss
def test_no_gradient_through_anything_but_logprobs(name) -> None:
    inputs = batch_of([[0.05, -0.02], [0.01]], [1.0, -0.5], [[0.9, 1.0], [0.95]])
    others = [inputs.old_logprobs, inputs.advantages, inputs.router_shift, inputs.rollout_logprobs]
    for other in others:
        other.requires_grad_()
    outputs = run(name, inputs)
    outputs.loss_sum.backward()
    assert all(other.grad is None for other in others)
    assert inputs.logprobs.grad is not None
    assert not outputs.denominator.requires_grad
    assert not any(v.requires_grad for pair in outputs.metrics.values() for v in pair)


@every_loss
@pytest.mark.parametrize("size", [0, 5])
def test_nothing_trained_gives_an_attached_zero(name, size) -> None:
    inputs = LossInputs(
        logprobs=torch.full((size,), torch.nan).requires_grad_(),
        old_logprobs=torch.full((size,), torch.nan),
        advantages=torch.full((size,), torch.nan),
        mask=torch.zeros(size, dtype=torch.bool),
        sequence_ids=torch.arange(size) // 2,
        router_shift=torch.full((size,), torch.nan),
        rollout_logprobs=torch.full((size,), torch.nan),
    )
    outputs = run(name, inputs)
    loss = outputs.loss_sum / outputs.denominator
    loss.backward()
    assert loss.item() == 0.0
    assert torch.equal(inputs.logprobs.grad, torch.zeros(size))
    assert all(value.item() == 0.0 for value, _ in outputs.metrics.values())


@every_loss
def test_sequences_without_a_trained_token_do_not_dilute_the_mean(name) -> None:
    inputs = batch_of([[0.1, 0.2], [0.3]], [1.0, -1.0], [[0.9, 0.9], [0.9]])
    loss, _ = loss_and_gradient(run(name, inputs), inputs)
    padded = LossInputs(
        logprobs=torch.cat([inputs.logprobs.detach(), torch.zeros(2)]).requires_grad_(),
        old_logprobs=torch.cat([inputs.old_logprobs, torch.zeros(2)]),
        advantages=torch.cat([inputs.advantages, torch.ones(2)]),
        mask=torch.tensor([True, True, True, False, False]),
        sequence_ids=torch.tensor([0, 0, 1, 2, 3]),
        router_shift=torch.cat([inputs.router_shift, torch.ones(2)]),
        rollout_logprobs=torch.cat([inputs.rollout_logprobs, torch.zeros(2)]),
        num_sequences=3,
    )
    padded_loss, gradient = loss_and_gradient(run(name, padded), padded)
    assert padded_loss.item() == loss.item()
    assert gradient[3:].tolist() == [0.0, 0.0]


@every_loss
@pytest.mark.parametrize("log_ratio", [-200.0, -50.0, 50.0, 200.0])
@pytest.mark.parametrize("advantage", [-2.0, 2.0])
def test_extreme_ratios_stay_finite_in_float32(name, log_ratio, advantage) -> None:
    inputs = batch_of([[log_ratio, 0.1], [log_ratio]], [advantage, advantage], [[0.0, 1.0], [0.8]])
    inputs = take(inputs, torch.arange(3))
    changes = {
        key: value.float().detach()
        for key, value in vars(inputs).items()
        if isinstance(value, torch.Tensor) and value.dtype == torch.float64
    }
    changes["logprobs"] = changes["logprobs"].requires_grad_()
    inputs = dataclasses.replace(inputs, **changes)
    outputs = run(name, inputs)
    loss, gradient = loss_and_gradient(outputs, inputs)
    assert loss.dtype == torch.float32
    assert torch.isfinite(loss) and torch.isfinite(gradient).all()
    assert all(torch.isfinite(v) for pair in outputs.metrics.values() for v in pair)


@every_loss
def test_bfloat16_logprobs_are_computed_in_float32(name) -> None:
    inputs = random_batch(3, shift=True, dtype=torch.bfloat16)
    outputs = run(name, inputs)
    wide = random_batch(3, shift=True, dtype=torch.bfloat16)
    wide = dataclasses.replace(
        wide,
        logprobs=wide.logprobs.detach().float().requires_grad_(),
        old_logprobs=wide.old_logprobs.float(),
        router_shift=wide.router_shift.float(),
        rollout_logprobs=wide.rollout_logprobs.float(),
    )
    assert outputs.loss_sum.dtype == torch.float32
    assert outputs.loss_sum.item() == run(name, wide).loss_sum.item()


def test_shapes_are_checked() -> None:
    good = vars(random_batch(0))
    with pytest.raises(ValueError, match="found mask of shape"):
        LossInputs(**{**good, "mask": good["mask"][:-1]})
    with pytest.raises(ValueError, match="found logprobs of shape"):
        LossInputs(**{k: v[None] if isinstance(v, torch.Tensor) else v for k, v in good.items()})


@pytest.mark.parametrize("name", NEED_SHIFT)
def test_router_shift_is_required(name) -> None:
    with pytest.raises(ValueError, match="no router_shift"):
        run(name, batch_of([[0.1]], [1.0]))
