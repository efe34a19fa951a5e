"""Training under a parallel layout gives the losses, gradients and weights of a single process."""

import dataclasses
import functools

import numpy as np
import pytest

from tests.support.layouts import CASES, TOLERANCE, Case, Run, compare, run_case, single_process

#: The others take minutes together and are marked slow; `tools/bench/layouts.py` shows all numbers.
QUICK = (
    "TP2",
    "PP2 VPP2",
    "TP2 EP2, gated shared expert",
    "EP2, sigmoid and bias",
    "PP2, tied embeddings",
    "TP2, router losses",
    "TP2 PP2 EP2",
)


@functools.cache
def reference(name: str) -> Run:
    """The single process a case is compared with."""
    (case,) = (case for case in CASES if case.name == name)
    return run_case(single_process(case))


def parameters() -> list:
    return [
        pytest.param(case, id=case.name, marks=() if case.name in QUICK else pytest.mark.slow)
        for case in CASES
    ]


@pytest.mark.parametrize("case", parameters())
def test_a_layout_trains_like_a_single_process(case: Case):
    difference = compare(run_case(case), reference(case.name))
    assert difference.largest < TOLERANCE, difference


def test_quick_layouts_exist():
    assert set(QUICK) <= {case.name for case in CASES}


def test_the_routers_move_and_the_gradient_is_clipped():
    """Else the comparison above would say little."""
    run = reference("TP2")
    gamma = np.concatenate(list(run.gamma.values()))
    assert gamma.min() < 0.8 and gamma.max() < 1.0
    assert run.scalars["grad_norm of update 0"] > 0.2
    squares = sum(float(np.sum(grad.astype(np.float64) ** 2)) for grad in run.gradients.values())
    assert squares**0.5 == pytest.approx(0.2, rel=1e-4)


@pytest.mark.parametrize("kind", ["weights", "gradients", "gamma", "old_logprobs"])
def test_a_difference_in_one_tensor_is_seen(kind):
    run = reference("TP2")
    tensors = dict(getattr(run, kind))
    name = next(iter(tensors))
    tensors[name] = tensors[name] * 1.001
    difference = compare(dataclasses.replace(run, **{kind: tensors}), run)
    assert difference.largest == pytest.approx(1e-3, rel=1e-3)
