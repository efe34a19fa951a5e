"""The sampler's log-probabilities and router traces train as those of a scoring pass do."""

import numpy as np
import pytest

from tests.support.layout_cases import CP2, EP2, LATENT, PP2, SHARED, SIGMOID, TP2, VPP2, Case
from tests.support.layout_parameters import parameters
from tests.support.layouts import relative
from tests.support.ranks import run_on_ranks
from tests.support.sampler_scores import both_ways

UNION = {"router_shift": {"floor": 0.05, "distance": "union"}}
CASES = (
    Case("one process", 1, {}),
    Case("TP2", 2, TP2),
    Case("PP2", 2, PP2),
    Case("PP2 VPP2", 2, VPP2),
    Case("EP2", 2, EP2),
    Case("CP2", 2, CP2),
    Case("DP2", 2, {}),
    Case("CP2 TP2", 4, {**CP2, **TP2}, {**SIGMOID, **SHARED}),
    Case("sigmoid", 1, {}, SIGMOID),
    Case("union", 1, {}, algorithm=UNION),
    Case("PP2, union", 2, PP2, algorithm=UNION),
    Case("R2", 1, {}, algorithm={"routing_replay": "r2"}),
    Case("latent attention, whole prompts", 1, {}, LATENT, share_prompts="off"),
)
KEPT = tuple(
    Case(f"{name}, kept tokens", ranks, parallel, kept=True)
    for name, ranks, parallel in (
        ("one process", 1, {}), ("TP2", 2, TP2), ("PP2", 2, PP2), ("CP2", 2, CP2), ("EP2", 2, EP2),
        ("DP2", 2, {}), ("TP2 PP2", 4, {**TP2, **PP2}),
    )
)  # fmt: skip
QUICK = ("one process", "TP2", "PP2 VPP2", "CP2", "union", "R2", "TP2, kept tokens")


@pytest.mark.parametrize("case", parameters((*CASES, *KEPT), QUICK))
def test_updates_are_those_after_a_scoring_pass(case: Case):
    for results in run_on_ranks(case.ranks, both_ways, case, timeout_s=300.0):
        agreement = results["agreement"]
        assert agreement.agrees and agreement.flips == 0, agreement
        assert agreement.logprob_max < 2e-5 and agreement.router_max < 2e-5, agreement
        assert agreement.tokens > 100 and agreement.choices >= 4 * 100
        assert any(results["shared"]) == (case.share_prompts == "auto")
        smallest = 1.0
        for by_pass, by_sampler in zip(results["pass"], results["sampler"], strict=True):
            for name in ("loss", "grad_norm", "entropy"):
                assert by_sampler[name] == pytest.approx(by_pass[name], rel=1e-5, abs=1e-5)
            for found, expected in zip(by_sampler["gamma"], by_pass["gamma"], strict=True):
                np.testing.assert_allclose(found, expected, atol=1e-5)
                smallest = min(smallest, expected.min(initial=1.0))
            for name, expected in by_pass["gradients"].items():
                assert relative(by_sampler["gradients"][name], expected) < 1e-5, name
        if not case.parallel.get("pipeline"):  # the last stage alone has gamma
            assert smallest < 0.9
