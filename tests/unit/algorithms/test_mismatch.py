"""Weights for the sampler's mismatch, by hand: rho = 4, 0.6, 1 | 0.25, 3 | (masked)."""

from __future__ import annotations

import pytest
import torch

from megatron_rl.algorithms.mismatch import (
    icepop_weights,
    mis_sequence_weights,
    mis_token_weights,
    tis_weights,
)

RHO = torch.tensor([4.0, 0.6, 1.0, 0.25, 3.0], dtype=torch.float64)
OLD = torch.cat([RHO.log() - 2, torch.tensor([torch.nan])])
ROLLOUT = torch.full_like(OLD, -2)
MASK = torch.tensor([True] * 5 + [False])
IDS = torch.tensor([0, 0, 0, 1, 1, 2])


def test_tis() -> None:
    assert tis_weights(OLD, ROLLOUT, MASK).tolist() == pytest.approx([2, 0.6, 1, 0.25, 2, 0])
    assert tis_weights(OLD, ROLLOUT, MASK, cap=3.5)[:5].tolist() == pytest.approx(
        [3.5, 0.6, 1, 0.25, 3]
    )


def test_mis_by_token() -> None:
    assert mis_token_weights(OLD, ROLLOUT, MASK).tolist() == pytest.approx([0, 0.6, 1, 0.25, 0, 0])


def test_mis_by_sequence() -> None:
    # products 2.4 and 0.75
    weights = mis_sequence_weights(OLD, ROLLOUT, MASK, IDS, cap=2.5)
    assert weights.tolist() == pytest.approx([2.4, 2.4, 2.4, 0.75, 0.75, 0])
    weights = mis_sequence_weights(OLD, ROLLOUT, MASK, IDS, cap=1.5, num_sequences=2)
    assert weights.tolist() == pytest.approx([0, 0, 0, 0.75, 0.75, 0])


def test_icepop() -> None:
    assert icepop_weights(OLD, ROLLOUT, MASK).tolist() == pytest.approx([4, 0.6, 1, 0, 3, 0])
    weights = icepop_weights(OLD, ROLLOUT, MASK, low=0.7, high=3.5)
    assert weights.tolist() == pytest.approx([0, 0, 1, 0, 3, 0])


@pytest.mark.parametrize("weigh", [tis_weights, mis_token_weights, icepop_weights])
def test_detached_and_finite(weigh) -> None:
    old = torch.tensor([0.0, -300.0], requires_grad=True)
    weights = weigh(old, torch.tensor([-300.0, 0.0]), torch.tensor([True, True]))
    assert not weights.requires_grad
    assert torch.isfinite(weights).all()
