"""Routing replay under a parallel layout gives what it gives in a single process.

R3 takes routes that no router would choose: every token of every layer goes to random experts.
Then nothing fits by chance: a rank that takes other tokens' or layers' routes gives other numbers.
"""

import dataclasses
from unittest import mock

import numpy as np
import pytest

from megatron_rl.config.layout import moe_layers
from megatron_rl.records import RoutedExperts
from tests.support import layouts
from tests.support.layout_cases import (
    ALLGATHER,
    CP2,
    EP2,
    ETP2,
    FULL,
    GROUPS,
    MANY_EXPERTS,
    PP2,
    PP4,
    SHARDED,
    SIGMOID,
    TOLERANCE,
    TP2,
    VPP2,
    WEIGHTS,
    Case,
)
from tests.support.layouts import References, Run, compare, single_process
from tests.support.ranks import run_on_ranks

R2 = {"routing_replay": "r2"}
R3 = {"routing_replay": "r3"}
#: A distance a layer travels to the last stage; the packs go forward twice.
QUANTILE = {
    "router_shift": {
        "floor": 0.05,
        "layers": "quantile",
        "quantile": 0.6,
        "normalise": "batch_mean",
    },
}
PENALTY = {"router_shift": {"floor": 0.05, "penalty": 0.5}}
SIGMOID_GROUPS = {**SIGMOID, **GROUPS}

CASES = (
    Case("TP2 EP2, sigmoid groups, R3", 2, {**TP2, **EP2}, SIGMOID_GROUPS, algorithm=R3),
    Case("CP2 recompute, R3", 2, {**CP2, **FULL}, algorithm=R3),
    Case("PP2 recompute, R3 quantile", 2, {**PP2, **FULL}, algorithm={**R3, **QUANTILE}),
    Case("PP2 VPP2 recompute, R2 penalty", 2, {**VPP2, **FULL}, algorithm={**R2, **PENALTY}),
    # The rest takes a minute and is marked slow.
    Case("recompute, R2", 1, FULL, algorithm=R2),
    Case("PP2 VPP2, quantile", 2, VPP2, {"moe_layer_freq": [0, 0, 1, 1]}, algorithm=QUANTILE),
    Case("PP2 VPP2 recompute, R3", 2, {**VPP2, **FULL}, {"moe_layer_freq": 2}, algorithm=R3),
    Case("TP2, R3", 2, TP2, algorithm=R3),
    Case("PP2, R2", 2, PP2, algorithm=R2),
    Case("TP2, R2", 2, TP2, algorithm=R2),
    Case("EP2, 260 experts, R3", 2, EP2, MANY_EXPERTS, algorithm=R3),
    Case("EP2 recompute, R3, weights", 2, {**EP2, **FULL, **WEIGHTS}, algorithm=R3),
    Case("ETP2, R3", 2, ETP2, algorithm=R3),
    Case("DP2, R3", 2, {}, algorithm=R3),
    Case("PP4 recompute, R3", 4, {**PP4, **FULL}, algorithm=R3),
    Case("TP2 PP2 EP2 recompute, R3", 4, {**TP2, **PP2, **EP2, **FULL}, algorithm=R3),
    Case("CP2 TP2, R3", 4, {**CP2, **TP2}, algorithm=R3),
    Case("CP2 PP2 VPP2, R3 quantile", 4, {**CP2, **VPP2}, algorithm={**R3, **QUANTILE}),
    Case("PP2 VPP2 EP2 recompute, R3", 4, {**VPP2, **EP2, **FULL}, SIGMOID_GROUPS, algorithm=R3),
    Case("EP2 allgather, R3", 2, {**EP2, **ALLGATHER}, algorithm=R3),
    Case("PP2 sharded, R3", 4, {**PP2, **SHARDED}, algorithm=R3),
    Case("PP4, quantile", 4, PP4, algorithm=QUANTILE),
    Case("TP2 PP2, quantile", 4, {**TP2, **PP2}, algorithm=QUANTILE),
)
QUICK = 4


def routed_batch(case: Case) -> list:
    """The usual sequences, each with random experts for every layer; in turns, of three tokens in
    four.
    """
    model = layouts.layout_config(case).model
    layers = tuple(i + 1 for i, is_moe in enumerate(moe_layers(model)) if is_moe)
    rng = np.random.default_rng(11)
    samples = []
    for sample in layouts.rollout_batch(case):
        scores = rng.random((len(sample.tokens) - 1, len(layers), model.num_experts))
        ids = scores.argsort(axis=-1)[..., : model.moe_top_k]
        ids = ids.astype(np.uint8 if model.num_experts <= 256 else np.int16)
        known = rng.random(len(ids)) < 0.75 if case.turns else None
        routed = RoutedExperts(ids, layers, known)
        samples.append(dataclasses.replace(sample, routed_experts=routed))
    return samples


def train_with_routes(case: Case) -> dict:
    """On a rank: `layouts.train_on_rank` on sequences with routes."""
    samples = routed_batch(case)
    with mock.patch.object(layouts, "rollout_batch", lambda _: samples):
        return layouts.train_on_rank(case)


def run(case: Case) -> Run:
    """Every case on its ranks, with routes in the batch (which only R3 looks at)."""
    return layouts.merge(run_on_ranks(case.ranks, train_with_routes, case, timeout_s=300.0))


@pytest.fixture(scope="module")
def references() -> References:
    """The single processes of this file's cases, with routes and without recomputation."""
    return References(run)


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=case.name, marks=pytest.mark.slow if i >= QUICK else ())
        for i, case in enumerate(CASES)
    ],
)
def test_a_layout_trains_like_a_single_process(case, references):
    difference = compare(run(case), references.of(case))
    assert difference.largest < TOLERANCE, difference


def test_replay_and_the_quantile_change_what_is_learned(references):
    """Else the comparison above would say little."""
    runs = {
        "none": references.of(Case("", 1, {})),
        "r2": references.of(CASES[3]),
        "r3": references.of(CASES[1]),
        "r3 and quantile": references.of(CASES[2]),
    }
    names = list(runs)
    for i, one in enumerate(names):
        for other in names[i + 1 :]:
            a, b = runs[one].weights, runs[other].weights
            furthest = max(float(np.abs(a[name] - b[name]).max()) for name in a)
            assert furthest > 1e-4, (one, other)
    # Replayed experts are used again, free ones are not; the routers move under both.
    assert runs["none"].scalars["router/top_k_overlap"] < 0.999
    for name in ("r2", "r3"):
        assert runs[name].scalars["router/top_k_overlap"] == 1.0
        assert runs[name].scalars["router/distance_mean"] > 1e-3


def _scored(case: Case, replayed: bool) -> dict:
    """On a rank: log-probabilities of the scoring pass, with the engine's or the slow routes."""
    from megatron_rl.models.gpt.chunk import routers_of
    from megatron_rl.policy.score import score
    from tests.unit.router.test_replay import judge

    samples = routed_batch(case)
    with layouts.policy_of(layouts.layout_config(case)) as policy:
        flat = [p for packs in layouts.packed_mini_batches(policy, samples) for p in packs]
        found = {}
        for pack in flat:
            if not replayed:
                policy.capture.close()
                routers = {n: pack.routes[n] for n in pack.routes}
                judge(policy.chunks[0], policy.config.model, routers)
                (item,) = score(policy, [dataclasses.replace(pack, routes=None)], with_traces=False)
                for layer in policy.chunks[0].decoder.layers:
                    del layer.mlp.router.routing
                policy.capture.__init__(routers_of(policy.chunks), [sorted(routers)])
            else:
                (item,) = score(policy, [pack], with_traces=True)
            found |= layouts.by_sequence(item.pack, item.old_logprobs)
    return found


def test_scoring_with_forced_routes_is_the_loop_over_tokens():
    """R3 with experts no router chose, against a router that takes them in a Python loop."""
    (found,) = run_on_ranks(1, _scored, Case("R3", 1, {}, algorithm=R3), True)
    (expected,) = run_on_ranks(1, _scored, Case("R3", 1, {}, algorithm=R3), False)
    free = run(single_process(Case("", 1, {}))).old_logprobs
    assert set(found) == set(expected) == set(free)
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, atol=2e-5)
    assert max(float(np.abs(free[name] - values).max()) for name, values in found.items()) > 0.5
