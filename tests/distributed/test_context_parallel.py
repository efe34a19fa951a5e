"""Training with the tokens of every pack spread over ranks gives what a single process gives."""

import functools

import pytest

from tests.support.layouts import AUX, GATED, SIGMOID, TOLERANCE, Case, compare, run_case
from tests.support.layouts import single_process

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
