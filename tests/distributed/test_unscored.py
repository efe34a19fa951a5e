"""The first update leaves the scores of its packs itself, and trains as after a scoring pass."""

import dataclasses

import pytest

from tests.support.layout_cases import CP2, EP2, FULL, LATENT, PP2, SIGMOID, TP2, VPP2, Case
from tests.support.layout_parameters import parameters
from tests.support.layouts import References, compare, run_case

BATCH_MEAN = {"router_shift": {"floor": 0.05, "normalise": "batch_mean"}}
QUANTILE = {"router_shift": {"floor": 0.05, "layers": "quantile", "quantile": 0.5}}
PENALTY = {"router_shift": {"floor": 0.05, "penalty": 2.0}}
CASES = (
    Case("one process", 1, {}),
    Case("TP2", 2, TP2),
    Case("PP2 VPP2", 2, VPP2),
    Case("PP2, quantile of layers", 2, PP2, algorithm=QUANTILE),
    Case("CP2", 2, CP2),
    Case("TP2 PP2 recompute full", 4, {**TP2, **PP2, **FULL}, SIGMOID),
    Case("EP2, batch mean", 2, EP2, algorithm=BATCH_MEAN),
    Case("R2", 1, {}, algorithm={"routing_replay": "r2"}),
    Case("PP2 recompute full, R2", 2, {**PP2, **FULL}, algorithm={"routing_replay": "r2"}),
    Case("PP2 recompute full, penalty", 2, {**PP2, **FULL}, algorithm=PENALTY),
    Case("gmpo", 1, {}, algorithm={"name": "gmpo"}),
    Case("sampler weights", 1, {}, algorithm={"mismatch": "tis"}),
    Case("reference", 1, {}, algorithm={"reference": "initial", "kl_coef": 0.5}),
    Case("CP2 TP2, latent attention", 4, {**CP2, **TP2}, LATENT),
    Case("shared prompts", 2, EP2, group=4),
)
QUICK = ("one process", "PP2 VPP2", "PP2 recompute full, R2", "EP2, batch mean")


@pytest.fixture(scope="module")
def references() -> References:
    """The single processes that score everything."""
    return References()


@pytest.mark.parametrize("case", parameters(CASES, QUICK))
def test_an_update_without_scores_is_the_same(case: Case, references: References):
    found = run_case(dataclasses.replace(case, scored=False))
    difference = compare(found, references.of(case))
    assert difference.largest < 1e-5, difference


def test_in_one_process_it_is_the_same_bit_for_bit(references: References):
    case = Case("one process", 1, {})
    found, expected = run_case(dataclasses.replace(case, scored=False)), references.of(case)
    difference = compare(found, expected)
    assert difference.largest == 0.0, difference
