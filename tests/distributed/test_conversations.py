"""Conversations of two turns, sampled and trained on: on one rank and under layouts the loss and
the gradients are those of plain loops over sequences and tokens.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest

from tests.support.conversations import TOOL, two_updates
from tests.support.layout_cases import EP2, TP2, Case
from tests.support.layouts import relative
from tests.support.ranks import run_on_ranks

#: Means over tokens, over sequences, and of one ratio a sequence.
LOSSES = {
    "dapo": {"name": "dapo"},
    "grpo": {"name": "grpo"},
    "gspo": {"name": "gspo", "settings": {"clip_low": 0.3, "clip_high": 0.3}},
}
LAYOUTS = {"EP2": EP2, "TP2": TP2}
TOLERANCE = 2e-5


@functools.cache
def one_rank(loss: str) -> dict[str, Any]:
    """A single process, and what loops give in its place."""
    (found,) = run_on_ranks(1, two_updates, case_of(loss, 1, {}), True, timeout_s=300.0)
    return found


def case_of(loss: str, ranks: int, parallel: dict[str, int]) -> Case:
    return Case(loss, ranks, parallel, algorithm={**LOSSES[loss], "mismatch": "tis"})


def test_the_tool_speaks_between_two_answers():
    """In some of the conversations; others are over after one answer."""
    two = 0
    for tokens, written, _ in one_rank("gspo")["samples"]:
        mask = "".join(".w"[word] for word in written)
        assert set(mask.strip(".").split("w")) <= {"", "." * len(TOOL)}
        middle = mask.strip(".").find(".")
        if middle >= 0:
            start = middle + mask.find("w")
            assert tuple(tokens[start : start + len(TOOL)]) == TOOL
            assert mask[start + len(TOOL)] == "w"
            two += 1
    assert 3 <= two < 8


@pytest.mark.parametrize("loss", LOSSES)
def test_one_rank_has_the_loss_and_gradients_of_the_loops(loss):
    found = one_rank(loss)
    expected_loss, expected = found["slow"]
    assert found["loss"] == pytest.approx(expected_loss, rel=TOLERANCE, abs=1e-6)
    assert_close(found["gradients"], expected)


@pytest.mark.parametrize("loss", ["dapo", "gspo"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_has_the_loss_and_gradients_of_the_loops(layout, loss):
    one = one_rank(loss)
    ranks = run_on_ranks(2, two_updates, case_of(loss, 2, LAYOUTS[layout]), False, timeout_s=300.0)
    samples = {tuple(map(tuple, part[:2])) for rank in ranks for part in rank["samples"]}
    assert samples == {tuple(map(tuple, part[:2])) for part in one["samples"]}
    expected_loss, expected = one["slow"]
    for rank in ranks:
        assert rank["loss"] == pytest.approx(expected_loss, rel=TOLERANCE, abs=1e-6)
    gradients = {name: value for rank in ranks for name, value in rank["gradients"].items()}
    assert_close(gradients, expected)


def assert_close(found, expected):
    assert set(found) == set(expected)
    errors = {name: relative(found[name], value) for name, value in expected.items()}
    worst = max(errors, key=errors.get)
    assert errors[worst] < TOLERANCE, (worst, errors[worst])
    assert sum(float(abs(value).max()) > 1e-4 for value in expected.values()) > len(expected) / 2
