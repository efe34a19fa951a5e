import math

import pytest
import torch

from tests.support.layouts import Case, layout_config, policy_of


def build(**optimizer):
    config = layout_config(Case("one", 1, {}, {"num_layers": 1}))
    updated = config.optimizer.model_copy(update=optimizer)
    return policy_of(config.model_copy(update={"optimizer": updated}))


def step(policy):
    """One optimizer step as the update pass takes it; the learning rate it used."""
    policy.scheduler.step(increment=1)
    policy.optimizer.step()
    return policy.optimizer.param_groups[0]["lr"]


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.5, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [0.5, 1.0] + [0.1 + 0.9 * (1 - n / 98) for n in (1, 2, 3)]),
        ("cosine", [0.5, 1.0] + [0.1 + 0.45 * (1 + math.cos(math.pi * n / 98)) for n in (1, 2, 3)]),
    ],
)
def test_learning_rate_warms_up_and_decays(schedule, expected):
    """Two steps of warm-up, then 98 down to the minimum: policies are built for 100 steps."""
    with build(lr=1.0, min_lr=0.1, schedule=schedule, warmup_steps=2) as policy:
        assert [step(policy) for _ in range(5)] == pytest.approx(expected)
        for _ in range(95):
            policy.scheduler.step(increment=1)
        last = 1.0 if schedule == "constant" else 0.1
        assert policy.optimizer.param_groups[0]["lr"] == pytest.approx(last)


def test_weights_decay_but_norms_do_not():
    with build(lr=0.1, weight_decay=0.5) as policy:
        before = {name: p.detach().clone() for name, p in policy.chunks[0].named_parameters()}
        policy.wrapped[0].zero_grad_buffer()
        step(policy)  # gradients are zero
        for name, parameter in policy.chunks[0].named_parameters():
            factor = 1.0 if "norm" in name else 1 - 0.1 * 0.5
            torch.testing.assert_close(parameter.detach(), before[name] * factor)


def test_a_step_is_adams():
    with build(lr=0.01, weight_decay=0.0, epsilon=1e-3, clip_grad=0.0) as policy:
        weight = policy.chunks[0].output_layer.weight
        before = weight.detach().clone()
        policy.wrapped[0].zero_grad_buffer()
        generator = torch.Generator().manual_seed(0)
        mean = square = 0.0
        expected = before.double()
        for n in (1, 2):
            gradient = torch.randn(weight.shape, generator=generator)
            weight.main_grad.copy_(gradient)
            step(policy)
            mean = 0.9 * mean + 0.1 * gradient.double()
            square = 0.95 * square + 0.05 * gradient.double() ** 2
            scaled = (square / (1 - 0.95**n)).sqrt() + 1e-3
            expected = expected - 0.01 * mean / (1 - 0.9**n) / scaled
        torch.testing.assert_close(weight.detach().double(), expected, atol=1e-6, rtol=1e-5)


def test_bf16_weights_have_fp32_main_weights():
    config = layout_config(Case("one", 1, {}, {"num_layers": 1, "dtype": "bf16"}))
    optimizer = config.optimizer.model_copy(update={"lr": 1e-6, "weight_decay": 0.0})
    with policy_of(config.model_copy(update={"optimizer": optimizer})) as policy:
        weight = policy.chunks[0].output_layer.weight
        assert weight.dtype == torch.bfloat16 and weight.main_grad.dtype == torch.float32
        before = weight.main_param.clone()
        policy.wrapped[0].zero_grad_buffer()
        weight.main_grad.fill_(1.0)
        step(policy)
        moved = before - weight.main_param
        assert float(moved.min()) > 0.0  # too small for bf16, but not lost
        assert torch.equal(weight.detach(), weight.main_param.bfloat16())
