"""Gradients of several losses at the same weights: against updates one after the other."""

import numpy as np
import pytest
import torch

from megatron_rl.config.schema import AlgorithmConfig
from megatron_rl.errors import UserError
from tests.support.layouts import Case, layout_config, policy_of, rollout_batch

CASE = Case("one", 1, {})
ARMS = ("gmpo", "rspo", "grpo")


@pytest.fixture(scope="module")
def policy():
    base = layout_config(CASE)
    algorithm = base.algorithm.model_copy(update={"name": "rspo"})
    optimizer = base.optimizer.model_copy(
        update={"clip_grad": 0.0, "lr": 0.01, "schedule": "constant"}
    )
    config = base.model_copy(update={"algorithm": algorithm, "optimizer": optimizer})
    with policy_of(config) as policy:
        yield policy


@pytest.fixture(scope="module")
def mini_batches(policy):
    """Five mini-batches, scored by the weights as they are."""
    from megatron_rl.policy.batch import pack_mini_batches
    from megatron_rl.policy.score import score

    samples = rollout_batch(CASE)
    slices = [
        samples[first : first + len(samples) // 5]
        for first in range(0, len(samples), len(samples) // 5)
    ][:5]
    packed = pack_mini_batches(slices, policy.config, policy.groups, policy.device.torch_device)
    return [score(policy, packs, with_traces=True) for packs in packed]


@pytest.fixture(scope="module")
def arms(policy):
    return {name: policy.config.algorithm.model_copy(update={"name": name}) for name in ARMS}


def weights(policy):
    return torch.cat([p.detach().flatten() for p in policy.chunks[0].parameters()]).clone()


def by_update(policy, algorithm, mini_batch):
    """The gradient that `update` leaves, with the weights put back after its step: numpy [P]."""
    import dataclasses

    from megatron_rl.observe.metrics import MetricSums
    from megatron_rl.policy.update import update
    from megatron_rl.router.telemetry import RouterTelemetry

    config = policy.config.model_copy(update={"algorithm": algorithm})
    before = [p.detach().clone() for p in policy.chunks[0].parameters()]
    own = dataclasses.replace(policy, config=config)
    update(own, mini_batch, MetricSums(4), RouterTelemetry(4, 8, torch.device("cpu")))
    found = np.concatenate(
        [p.main_grad.double().flatten().numpy() for p in policy.chunks[0].parameters()]
    )
    with torch.no_grad():
        for parameter, value in zip(policy.chunks[0].parameters(), before, strict=True):
            parameter.copy_(value)
    policy.optimizer.reload_model_params()
    return found


def test_at_the_old_policys_weights_router_shift_changes_nothing(policy, mini_batches, arms):
    from megatron_rl.tasks.gradients import measure

    before = weights(policy)
    found = measure(policy, mini_batches, arms)
    assert torch.equal(weights(policy), before)
    assert found.noise["rspo"].trace == pytest.approx(found.noise["gmpo"].trace, rel=1e-4)
    assert found.cosines["rspo"]["gmpo"] == pytest.approx(1.0, abs=1e-6)
    assert found.metrics["rspo"]["router/raw_gamma_mean"] == pytest.approx(1.0, abs=1e-5)
    assert "router/raw_gamma_mean" not in found.metrics["gmpo"]


def test_after_a_drift_the_numbers_are_those_of_the_updates_gradients(policy, mini_batches, arms):
    from megatron_rl.tasks.gradients import drift, measure

    before = weights(policy)
    steps = drift(policy, mini_batches[:2])
    assert steps["lr"] == pytest.approx(0.01) and not torch.equal(weights(policy), before)
    rest = mini_batches[2:]
    found = measure(policy, rest, arms)
    means = {}
    for name, algorithm in arms.items():
        rows = np.stack([by_update(policy, algorithm, mini_batch) for mini_batch in rest])
        means[name] = rows.mean(0)
        noise = found.noise[name]
        assert noise.mini_batches == 3
        assert noise.trace == pytest.approx(rows.var(0, ddof=1).sum(), rel=1e-5)
        assert noise.mean_square == pytest.approx((rows**2).sum(1).mean(), rel=1e-5)
        assert noise.square_of_mean == pytest.approx((means[name] ** 2).sum(), rel=1e-5)
    for name, other in (("gmpo", "rspo"), ("grpo", "gmpo")):
        a, b = means[name], means[other]
        cosine = a @ b / np.sqrt((a @ a) * (b @ b))
        assert found.cosines[name][other] == pytest.approx(cosine, abs=1e-6)
    assert found.metrics["rspo"]["router/raw_gamma_mean"] < 0.999
    assert abs(found.noise["rspo"].trace / found.noise["gmpo"].trace - 1) > 1e-3


@pytest.mark.parametrize(
    "change, message",
    [
        (
            {"advantages": "reinforce_pp"},
            "algorithm.advantages is reinforce_pp in b and group_norm",
        ),
        ({"router_shift": {"layers": "max"}}, "algorithm.router_shift.layers is max in b and mean"),
        ({"router_shift": {"experts": 1}}, "algorithm.router_shift.experts is 1 in b and None"),
        ({"reference": "initial", "kl_coef": 0.1}, "arm b needs a reference policy or"),
        ({"routing_replay": "r3"}, "arm b needs a reference policy or the sampler's experts"),
    ],
)
def test_arms_that_one_batch_cannot_serve_are_refused(change, message):
    from megatron_rl.tasks.gradients import check_comparable

    base = AlgorithmConfig()
    check_comparable(base, {"a": base, "b": base.model_copy(update={"name": "gmpo"})})
    with pytest.raises(UserError, match=message):
        check_comparable(base, {"a": base, "b": AlgorithmConfig(**change)})
