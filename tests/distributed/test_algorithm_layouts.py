"""Variants of the algorithm give under a parallel layout what they give in a single process."""

import dataclasses
import functools

import numpy as np
import pytest

from tests.support.layout_cases import TOLERANCE, Case
from tests.support.layouts import Run, compare, run_case, single_process

#: Everything that needs numbers of the whole mini-batch or of other ranks, at once.
ONE = {
    "name": "gspo",
    "settings": {"clip_low": 0.5, "clip_high": 0.5},
    "router_shift": {
        "enabled": True,
        "floor": 0.05,
        "normalise": "batch_mean",
        "layers": "max",
    },
    "mismatch": "tis",
    "kl_coef": 0.5,
    "kl_estimator": "k2",
    "reference": "initial",
    "entropy_coef": 0.05,
}
OTHER = {
    "router_shift": {"floor": 0.05, "mode": "negative_only", "normalise": "batch_mean"},
    "mismatch": "mis_sequence",
    "kl_coef": 0.2,
    "kl_estimator": "k3",
    "reference": "initial",
}
#: Rules of DPPO's line, a trace of all experts, and the last layer alone.
THIRD = {
    "name": "dppo_tv",
    "settings": {"anchor": "old", "divergence_low": 2e-4, "divergence_high": 2e-4},
    "router_shift": {"enabled": True, "floor": 0.05, "distance": "union", "layers": "last"},
    "mismatch": "off_policy_mask",
    "mismatch_settings": {"delta": 3.6},
}
#: Without the stop-gradient: not over stages.
FOURTH = {
    "name": "drpo",
    "settings": {"delta": 0.05, "anchor": "old"},
    "router_shift": {
        "enabled": True,
        "floor": 0.05,
        "distance": "gate_weighted",
        "stop_gradient": False,
        "penalty": 0.4,
    },
    "mismatch": "kpop",
    "mismatch_settings": {"phi": 2.0},
}
#: A gradient that each router adds where stages or a recomputation hide the distance.
FIFTH = {
    "name": "rspo",
    "router_shift": {"floor": 0.05, "penalty": 2.0},
}
LAYOUTS = {
    "TP2": (2, {"tensor": 2}),
    "PP2 VPP2": (2, {"pipeline": 2, "virtual_pipeline": 2}),
    "EP2": (2, {"expert": 2}),
    "CP2": (2, {"context": 2}),
}
FULL = {"recompute": "full"}
RECOMPUTED = {
    "recompute": (1, FULL),
    "TP2 recompute": (2, {"tensor": 2, **FULL}),
    "PP2 recompute": (2, {"pipeline": 2, **FULL}),
    "PP2 VPP2 recompute": (2, {"pipeline": 2, "virtual_pipeline": 2, **FULL}),
    "EP2 recompute": (2, {"expert": 2, **FULL}),
    "CP2 recompute": (2, {"context": 2, **FULL}),
}
CASES = [
    Case(f"{name}, {label}", ranks, parallel, algorithm=algorithm)
    for label, algorithm in (
        *(("one", ONE), ("other", OTHER), ("third", THIRD), ("fourth", FOURTH), ("fifth", FIFTH)),
    )
    for name, (ranks, parallel) in LAYOUTS.items()
    if algorithm is not FOURTH or "pipeline" not in parallel
]
CASES += [
    Case(f"{name}, fifth", ranks, parallel, algorithm=FIFTH)
    for name, (ranks, parallel) in RECOMPUTED.items()
]
SLOW = (
    "TP2 recompute, fifth",
    "EP2 recompute, fifth",
    "CP2 recompute, fifth",
    "TP2, fifth",
    "EP2, fifth",
    "CP2, fifth",
    "TP2, other",
    "EP2, other",
    "CP2, other",
    "EP2, third",
    "TP2, third",
    "EP2, fourth",
)


@functools.cache
def reference(label: str) -> Run:
    """The single process of a variant."""
    case = next(case for case in CASES if case.name.endswith(label))
    return run_case(single_process(case))


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=case.name, marks=pytest.mark.slow if case.name in SLOW else ())
        for case in CASES
    ],
)
def test_a_layout_trains_like_a_single_process(case):
    difference = compare(run_case(case), reference(case.name.rpartition(" ")[2]))
    assert difference.largest < TOLERANCE, difference


def test_every_part_of_the_variant_counts():
    """Else the comparison above would say little: without any of them other weights come out."""
    whole = reference("one").weights
    shift = ONE["router_shift"]
    changes = [
        {"router_shift": {**shift, "mode": "range"}},
        {"router_shift": {**shift, "normalise": "none"}},
        {"router_shift": {**shift, "layers": "mean"}},
        {"mismatch": "none"},
        {"kl_coef": 0.0},
        {"entropy_coef": 0.0},
    ]
    for change in changes:
        case = dataclasses.replace(CASES[0], algorithm={**ONE, **change})
        weights = run_case(single_process(case)).weights
        furthest = max(float(np.abs(weights[name] - whole[name]).max()) for name in whole)
        assert furthest > 1e-5, change


@pytest.mark.slow
def test_every_part_of_the_newer_rules_counts():
    whole = {label: reference(label).weights for label in ("third", "fourth", "fifth")}
    shift = FOURTH["router_shift"]
    changes = [
        ("third", {"settings": {"anchor": "old"}}),
        ("third", {"mismatch_settings": {"delta": 1e6}}),
        ("third", {"router_shift": {**THIRD["router_shift"], "layers": "mean"}}),
        ("third", {"router_shift": {**THIRD["router_shift"], "distance": "top_k"}}),
        ("fourth", {"router_shift": {**shift, "stop_gradient": True}}),
        ("fourth", {"router_shift": {**shift, "distance": "top_k"}}),
        ("fourth", {"router_shift": {**shift, "penalty": 0.0}}),
        ("fifth", {"router_shift": {"floor": 0.05}}),
        ("fourth", {"mismatch_settings": {"phi": 1e6}}),
    ]
    for label, change in changes:
        algorithm = {**{"third": THIRD, "fourth": FOURTH, "fifth": FIFTH}[label], **change}
        case = dataclasses.replace(CASES[0], algorithm=algorithm)
        weights = run_case(single_process(case)).weights
        furthest = max(float(np.abs(weights[n] - w).max()) for n, w in whole[label].items())
        assert furthest > 1e-6, (change, furthest)
