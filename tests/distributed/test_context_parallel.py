"""What context-parallel ranks share a pack for: the supervised step and the router's counts.

That their policy update is that of a single process is in `test_layouts.py`.
"""

import pytest
import torch

from tests.support.layout_cases import TOLERANCE, Case
from tests.support.layouts import (
    gathered,
    layout_config,
    packed_mini_batches,
    policy_of,
    relative,
    rollout_batch,
)
from tests.support.ranks import run_on_ranks

ONE = Case("one process", 1, {})


def supervised(case):
    """On a rank: loss and weights of one supervised step."""
    from megatron_rl.observe.metrics import MetricSums
    from megatron_rl.policy.update import supervised_update

    with policy_of(layout_config(case)) as policy:
        packs = packed_mini_batches(policy, rollout_batch(case))[0]
        sums = MetricSums(policy.config.model.num_layers)
        supervised_update(policy, packs, sums)
        return sums.reduce(policy.groups.world), gathered(policy, "data")


def test_supervised_training_is_that_of_a_single_process():
    case = Case("CP2 EP2", 2, {"context": 2, "expert": 2})
    metrics, weights = run_on_ranks(1, supervised, ONE)[0]
    for found, some_weights in run_on_ranks(2, supervised, case):
        for name in ("loss", "grad_norm"):
            assert found[name] == pytest.approx(metrics[name], rel=TOLERANCE)
        assert some_weights  # each rank has its own experts, and all dense weights
        for name, value in some_weights.items():
            assert relative(value, weights[name]) < TOLERANCE, name


def counted_tokens(case):
    """On a rank: tokens its routers counted, trained tokens of its packs, and mask's size there."""
    from megatron_rl.observe.metrics import MetricSums
    from megatron_rl.policy.score import score
    from megatron_rl.policy.update import update
    from megatron_rl.router.telemetry import RouterTelemetry

    with policy_of(layout_config(case)) as policy:
        packs = packed_mini_batches(policy, rollout_batch(case))[0]
        model = policy.config.model
        telemetry = RouterTelemetry(model.num_layers, model.num_experts, torch.device("cpu"))
        scored = score(policy, packs, with_traces=True)
        update(policy, scored, MetricSums(model.num_layers), telemetry)
        loads = telemetry.load.sum(1) / model.moe_top_k
        return telemetry.sums[:, 0].tolist(), loads.tolist(), sum(int(p.mask.sum()) for p in packs)


def test_telemetry_counts_each_trained_token_once():
    results = run_on_ranks(4, counted_tokens, Case("CP2 TP2", 4, {"context": 2, "tensor": 2}))
    (trained,) = {result[2] for result in results}
    assert trained > 50
    for layer in range(4):
        counts = [result[0][layer] for result in results]
        assert sum(counts) == trained and min(counts) > 0
        assert sum(result[1][layer] for result in results) == trained
