"""Weights for the sampler's mismatch, by hand: rho = 4, 0.6, 1 | 0.25, 3 | (masked)."""

from __future__ import annotations

import pytest
import torch

from megatron_rl.algorithms import LossInputs
from megatron_rl.algorithms.mismatch import icepop, mis_sequence, mis_token, tis
from megatron_rl.catalogue.corrections import CapSettings, IcepopSettings

RHO = torch.tensor([4.0, 0.6, 1.0, 0.25, 3.0], dtype=torch.float64)
OLD = torch.cat([RHO.log() - 2, torch.tensor([torch.nan])])
ROLLOUT = torch.full_like(OLD, -2)
MASK = torch.tensor([True] * 5 + [False])
IDS = torch.tensor([0, 0, 0, 1, 1, 2])


def inputs(old=OLD, rollout=ROLLOUT, mask=MASK, ids=IDS, num_sequences=None):
    same = torch.zeros_like(old)
    return LossInputs(
        logprobs=same,
        old_logprobs=old,
        advantages=same,
        mask=mask,
        sequence_ids=ids,
        rollout_logprobs=rollout,
        num_sequences=num_sequences,
    )


def weights(correct, settings, **given):
    """The weights, and the places where they were cut."""
    found = correct(inputs(**given), settings)
    return found.weights.tolist(), found.clipped.nonzero().flatten().tolist()


def test_tis() -> None:
    found, cut = weights(tis, CapSettings())
    assert found == pytest.approx([2, 0.6, 1, 0.25, 2, 0]) and cut == [0, 4]
    found, cut = weights(tis, CapSettings(high=3.5))
    assert found == pytest.approx([3.5, 0.6, 1, 0.25, 3, 0]) and cut == [0]


def test_mis_by_token() -> None:
    found, cut = weights(mis_token, CapSettings())
    assert found == pytest.approx([0, 0.6, 1, 0.25, 0, 0]) and cut == [0, 4]


def test_mis_by_sequence() -> None:
    # products 2.4 and 0.75
    found, cut = weights(mis_sequence, CapSettings(high=2.5))
    assert found == pytest.approx([2.4, 2.4, 2.4, 0.75, 0.75, 0]) and cut == []
    found, cut = weights(mis_sequence, CapSettings(high=1.5), num_sequences=2)
    assert found == pytest.approx([0, 0, 0, 0.75, 0.75, 0]) and cut == [0, 1, 2]


def test_icepop() -> None:
    found, cut = weights(icepop, IcepopSettings())
    assert found == pytest.approx([4, 0.6, 1, 0, 3, 0]) and cut == [3]
    found, cut = weights(icepop, IcepopSettings(low=0.7, high=3.5))
    assert found == pytest.approx([0, 0, 1, 0, 3, 0]) and cut == [0, 1, 3]


@pytest.mark.parametrize(
    ("correct", "settings"),
    [(tis, CapSettings()), (mis_token, CapSettings()), (icepop, IcepopSettings())],
)
def test_detached_and_finite(correct, settings) -> None:
    old = torch.tensor([0.0, -300.0], requires_grad=True)
    mask, ids = torch.tensor([True, True]), torch.tensor([0, 0])
    found = correct(inputs(old, torch.tensor([-300.0, 0.0]), mask, ids), settings)
    assert not found.weights.requires_grad
    assert torch.isfinite(found.weights).all()
