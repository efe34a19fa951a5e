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


@pytest.mark.parametrize("distributed", [False, True])
def test_adam_is_torchs_kernel_on_a_cpu_with_torchs_values(distributed, monkeypatch):
    """Each step of the kernel against torch's loop over the weights, one element at a time."""
    config = layout_config(Case("one", 1, {"distributed_optimizer": distributed}, {}))
    seen = []
    kernel = torch._fused_adamw_

    def watched(weights, *args, **kwargs):
        seen.append(len(weights))
        return kernel(weights, *args, **kwargs)

    monkeypatch.setattr(torch, "_fused_adamw_", watched)
    results = []
    for fused in (True, False):
        with policy_of(config) as policy:
            for member in policy.optimizer.chained_optimizers:
                for group in member.optimizer.param_groups:
                    assert group["fused"] is True
                    group["fused"] = fused
            generator = torch.Generator().manual_seed(6)
            for _ in range(2):
                policy.wrapped[0].zero_grad_buffer()
                for parameter in policy.chunks[0].parameters():
                    gradient = torch.randn(parameter.shape, generator=generator)
                    parameter.main_grad.copy_(gradient)
                step(policy)
            results.append([p.detach().clone() for p in policy.chunks[0].parameters()])
        count, seen = sum(seen), []
        assert (count > 0) == fused
    for ours, theirs in zip(*results):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6)


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


def test_a_run_that_goes_on_has_the_schedule_of_its_configuration():
    """Two updates of a run of two; then two more of four, with everything else changed as well."""
    from megatron_rl.policy.optimizer import continue_schedule

    with build(lr=1.0, schedule="cosine", weight_decay=0.5, beta1=0.5) as policy:
        policy.scheduler.lr_decay_steps = 2
        assert [step(policy) for _ in range(2)] == pytest.approx([0.5, 0.0])
        state = policy.scheduler.state_dict()
    changed = {"lr": 0.8, "min_lr": 0.1, "schedule": "linear", "weight_decay": 0.25, "beta1": 0.7}
    with build(**changed) as policy:
        continue_schedule(policy.scheduler, state, updates_left=2)
        assert [step(policy) for _ in range(2)] == pytest.approx([0.1 + 0.7 * 1 / 4, 0.1])
        decayed = [group for group in policy.optimizer.param_groups if group["wd_mult"] == 1.0]
        assert {group["weight_decay"] for group in decayed} == {0.25}
        assert {group["betas"][0] for group in decayed} == {0.7}


def test_warm_up_that_is_longer_now_goes_on_where_the_updates_stand():
    from megatron_rl.policy.optimizer import continue_schedule

    with build(lr=1.0, warmup_steps=1) as policy:
        for _ in range(3):
            step(policy)
        state = policy.scheduler.state_dict()
    with build(lr=1.0, warmup_steps=8) as policy:
        continue_schedule(policy.scheduler, state, updates_left=2)
        assert [step(policy) for _ in range(2)] == pytest.approx([4 / 8, 5 / 8])


def test_the_decay_ends_with_the_last_step_also_after_steps_of_other_mini_batches():
    """8 updates are done, of 4 a step; 2 steps of 2 are to come: 9 to 12 of 12."""
    from megatron_rl.policy.optimizer import continue_schedule

    with build(lr=1.0, schedule="linear") as policy:
        for _ in range(8):
            step(policy)
        state = policy.scheduler.state_dict()
    with build(lr=1.0, schedule="linear") as policy:
        continue_schedule(policy.scheduler, state, updates_left=4)
        assert [step(policy) for _ in range(4)] == pytest.approx([3 / 12, 2 / 12, 1 / 12, 0.0])
