"""Training with the tokens of every pack spread over ranks gives what a single process gives."""

import functools

import pytest
import torch

from tests.support.layouts import (
    AUX,
    GATED,
    SIGMOID,
    TOLERANCE,
    Case,
    compare,
    gathered,
    layout_config,
    packed_mini_batches,
    policy_of,
    relative,
    rollout_batch,
    run_case,
    single_process,
)
from tests.support.ranks import run_on_ranks

CP2, TP2, PP2, EP2 = {"context": 2}, {"tensor": 2}, {"pipeline": 2}, {"expert": 2}
CASES = [
    Case("CP2", 2, CP2),
    Case("CP2 EP2", 2, {**CP2, **EP2}),
    Case("CP2 TP2", 4, {**CP2, **TP2}),
    Case("CP2 PP2", 4, {**CP2, **PP2}),
    Case("CP2 PP2 VPP2", 4, {**CP2, **PP2, "virtual_pipeline": 2}),
    Case("CP2 DP2", 4, CP2),
    Case("CP2 TP2 EP4", 4, {**CP2, **TP2, "expert": 4}),
    Case("CP4", 4, {"context": 4}),
    Case("CP2 recompute full", 2, {**CP2, "recompute": "full"}),
    Case("CP2 recompute selective", 2, {**CP2, "recompute": "selective"}),
    Case("CP2 sharded optimizer", 2, {**CP2, "distributed_optimizer": True}, gradients=False),
    Case("CP2 EP2, gated shared expert", 2, {**CP2, **EP2}, GATED),
    Case("CP2, sigmoid and bias", 2, CP2, SIGMOID),
    # The balancing loss is a pack's own: padding sequences must not change which share a pack.
    Case("CP2, router losses", 2, CP2, AUX, one_per_pack=True),
    Case("CP2 TP2, router losses", 4, {**CP2, **TP2}, AUX, one_per_pack=True),
    Case("CP2 TP2 PP2", 8, {**CP2, **TP2, **PP2}),
]
QUICK = ("CP2", "CP2 EP2", "CP2 TP2", "CP2, router losses")
ONE = Case("one process", 1, {})


@functools.cache
def reference(name: str):
    (case,) = (case for case in CASES if case.name == name)
    return run_case(single_process(case))


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=case.name, marks=() if case.name in QUICK else pytest.mark.slow)
        for case in CASES
    ],
)
def test_context_parallel_ranks_train_like_a_single_process(case):
    difference = compare(run_case(case), reference(case.name))
    assert difference.largest < TOLERANCE, difference


def supervised(case):
    """On a rank: loss and weights of one supervised step."""
    from megatron_rl.observe.metrics import MetricSums
    from megatron_rl.training.update import supervised_update

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
    from megatron_rl.router.telemetry import RouterTelemetry
    from megatron_rl.training.score import score
    from megatron_rl.training.update import update

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
