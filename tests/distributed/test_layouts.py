"""Training under a parallel layout gives the losses, gradients and weights of a single process."""

import dataclasses

import numpy as np
import pytest

from tests.support.layout_cases import BF16, BF16_CASES, BF16_SEEDS, CASES, TOLERANCE, Case
from tests.support.layout_parameters import parameters
from tests.support.layouts import (
    References,
    Run,
    beyond,
    bf16_bounds,
    comparable_in_bf16,
    compare,
    compare_in_bf16,
    in_fp32,
    log_ratios,
    mean_factors,
    run_case,
)

#: The others take minutes together and are marked slow; `tools/bench/layouts.py` shows all numbers.
QUICK = (
    "TP2",
    "PP2 VPP2",
    "CP2",
    "CP2 TP2",
    "CP2 EP2",
    "TP2 EP2 ETP2",
    "TP2 EP2, gated shared expert",
    "EP2, sigmoid and bias",
    "PP2, tied embeddings",
    "TP2, aux and z loss",
    "EP2, aux and z loss",
    "CP2, aux and z loss",
    "TP2 PP2 EP2",
    "EP2 sharded optimizer",
    "EP2, weights",
    "TP2 EP2 ETP2, weights",
    "PP2 VPP2 EP2 sharded, overlapped, weights",
    "CP2 TP2, latent attention",
    "TP2 PP2 EP2, norm over heads",
    "TP2, dense model",
    "TP2, muon",
    "TP2 EP2 ETP2, muon",
    "TP2 EP2, bf16",
    "TP2, shared prompts, kept tokens",
)


@pytest.fixture(scope="module")
def references() -> References:
    """The single processes of this file's cases."""
    return References()


@pytest.mark.parametrize("case", parameters(CASES, QUICK))
def test_a_layout_trains_like_a_single_process(case: Case, references: References):
    difference = compare(run_case(case), references.of(case))
    assert difference.largest < TOLERANCE, difference


@pytest.mark.parametrize("case", parameters(BF16_CASES, QUICK))
def test_in_bf16_a_layout_is_no_further_from_fp32_than_a_single_process(
    case: Case, references: References
):
    """Over several seeds: one difference is one draw of the machine's rounding."""
    factors, bounds = compare_in_bf16(case, references)
    assert not beyond(factors, bounds), (factors, bounds)


def test_a_single_process_is_as_far_from_fp32_as_bf16_rounds(references: References):
    """Else the ratios above would compare noise of another kind."""
    case = Case("one", 1, {}, BF16)
    narrow, exact = (comparable_in_bf16(references.of(each)) for each in (case, in_fp32(case)))
    difference = compare(narrow, exact)
    assert 0.005 < difference.logprobs < 0.1
    assert 0.002 < difference.weights < 0.1


@pytest.mark.parametrize("kind", ["logprobs", "gamma", "gradients", "weights"])
def test_bf16_errors_twice_or_thrice_as_large_are_seen(kind, references: References):
    """Of a layout that rounds as a single process does, with its errors of one kind enlarged."""
    cases = [Case("one", 1, {}, BF16, seed=seed) for seed in range(BF16_SEEDS)]
    narrow = [comparable_in_bf16(references.of(case)) for case in cases]
    exact = [comparable_in_bf16(references.of(in_fp32(case))) for case in cases]
    field = {"logprobs": "old_logprobs"}.get(kind, kind)
    factor = 1.05 * bf16_bounds()[kind]

    def enlarged(run: Run, true: Run) -> Run:
        right = getattr(true, field)
        tensors = {
            name: right[name] + factor * (value - right[name])
            for name, value in getattr(run, field).items()
        }
        return dataclasses.replace(run, **{field: tensors})

    found = [enlarged(run, true) for run, true in zip(narrow, exact)]
    factors = mean_factors(log_ratios(found, narrow, exact))
    assert factors[kind] == pytest.approx(factor, rel=1e-3)
    assert beyond(factors, bf16_bounds()) == [kind]


def test_names_are_unique_and_the_quick_layouts_exist():
    names = [case.name for case in (*CASES, *BF16_CASES)]
    assert len(names) == len(set(names))
    assert set(QUICK) <= set(names)


def test_the_routers_move_and_the_gradient_is_clipped(references: References):
    """Else the comparison above would say little."""
    run = references.of(Case("one", 1, {}))
    gamma = np.concatenate(list(run.gamma.values()))
    assert gamma.min() < 0.8 and gamma.max() < 1.0
    assert run.scalars["grad_norm of update 0"] > 0.2
    squares = sum(float(np.sum(grad.astype(np.float64) ** 2)) for grad in run.gradients.values())
    assert squares**0.5 == pytest.approx(0.2, rel=1e-4)


@pytest.mark.parametrize("kind", ["weights", "gradients", "gamma", "old_logprobs", "scalars"])
def test_a_difference_in_one_tensor_is_seen(kind, references: References):
    run = references.of(Case("one", 1, {}))
    tensors = dict(getattr(run, kind))
    name = next(iter(tensors))
    tensors[name] = tensors[name] * 1.001
    difference = compare(dataclasses.replace(run, **{kind: tensors}), run)
    assert difference.largest == pytest.approx(1e-3, rel=1e-3)
    field = {"old_logprobs": "logprobs", "scalars": "loss"}.get(kind, kind)
    assert getattr(difference, field) == difference.largest
