"""Sequences that the policy wrote in turns, under parallel layouts: as in a single process.

Some have nothing that the policy wrote, some begin with its words, and of some tokens no sampler
knows the experts (R3).
"""

import dataclasses

import numpy as np
import pytest

from tests.distributed import test_replay as replay
from tests.support.layout_cases import CP2, EP2, PP2, TOLERANCE, TP2, VPP2, Case
from tests.support.layouts import References, compare, single_process

#: All that looks at the mask, beside the loss.
BESIDE = {
    "mismatch": "tis",
    "kl_coef": 0.2,
    "kl_estimator": "k3",
    "reference": "initial",
    "entropy_coef": 0.05,
    "routing_replay": "r3",
}
ONE = {"router_shift": {"floor": 0.05}, **BESIDE}
OTHER = {
    **BESIDE,
    "name": "gspo",
    "settings": {"clip_low": 0.5, "clip_high": 0.5},
    "router_shift": {"enabled": True, "floor": 0.05, "normalise": "batch_mean"},
    "mismatch": "mis_sequence",
}
CASES = (
    Case("TP2 EP2", 2, {**TP2, **EP2}, algorithm=ONE, turns=True),
    Case("CP2", 2, CP2, algorithm=ONE, turns=True),
    Case("PP2 VPP2", 2, VPP2, algorithm=OTHER, turns=True),
    # The rest is marked slow.
    Case("DP2", 2, {}, algorithm=OTHER, turns=True),
    Case("CP2, sequence", 2, CP2, algorithm=OTHER, turns=True),
    Case("CP2 TP2", 4, {**CP2, **TP2}, algorithm=ONE, turns=True),
    Case("TP2 PP2 EP2", 4, {**TP2, **PP2, **EP2}, algorithm=ONE, turns=True),
)
QUICK = 3


def test_the_masks_have_gaps_and_every_kind_of_sequence():
    samples = replay.routed_batch(CASES[0])
    written = ["".join(".w"[int(word)] for word in sample.written) for sample in samples]
    assert sum("w." in mask.lstrip("w") for mask in written) > 12
    assert sum(mask[0] == "w" for mask in written) >= 3
    assert sum("w" not in mask for mask in written) >= 3
    assert sum(mask[-1] == "." for mask in written) > 6
    for sample in samples:
        assert np.isnan(sample.rollout_logprobs[~sample.written]).all()
    unknown = sum(int((~sample.routed_experts.known).sum()) for sample in samples)
    assert unknown > 30


@pytest.fixture(scope="module")
def references() -> References:
    """The single processes of this file's cases."""
    return References(replay.run)


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=case.name, marks=pytest.mark.slow if i >= QUICK else ())
        for i, case in enumerate(CASES)
    ],
)
def test_a_layout_trains_like_a_single_process(case: Case, references: References):
    difference = compare(replay.run(case), references.of(case))
    assert difference.largest < TOLERANCE, difference


def test_the_masks_change_what_is_learned(references: References):
    """Else the comparison above would say little."""
    in_turns_, whole = (
        references.of(CASES[0]),
        replay.run(single_process(dataclasses.replace(CASES[0], turns=False))),
    )
    weights = (whole.weights[name] - value for name, value in in_turns_.weights.items())
    assert max(float(np.abs(difference).max()) for difference in weights) > 1e-3
