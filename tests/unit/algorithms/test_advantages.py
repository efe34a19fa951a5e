"""Advantages worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_rl.catalogue import kinds

ADVANTAGES = {row.name: row.load() for row in kinds.ADVANTAGES.rows}

REWARDS = torch.tensor([[1.0, 0.0, 0.0, 1.0], [3.0, 1.0, 1.0, 1.0]], dtype=torch.float64)
# centred: +-0.5, sum of squares 1;  1.5, -0.5, -0.5, -0.5, sum of squares 3


def test_names() -> None:
    assert set(ADVANTAGES) == {"group_norm", "group_mean", "rloo", "reinforce_pp"}


def test_group_norm() -> None:
    first, second = math.sqrt(1 / 3) + 1e-6, 1 + 1e-6
    expected = [[0.5 / first, -0.5 / first, -0.5 / first, 0.5 / first]]
    expected += [[1.5 / second, -0.5 / second, -0.5 / second, -0.5 / second]]
    values = ADVANTAGES["group_norm"](REWARDS)
    torch.testing.assert_close(values, torch.tensor(expected, dtype=torch.float64))
    std = (REWARDS.std(dim=1, keepdim=True) + 1e-6).expand(2, 4)
    torch.testing.assert_close(values, (REWARDS - REWARDS.mean(1, keepdim=True)) / std)


def test_group_mean() -> None:
    expected = [[0.5, -0.5, -0.5, 0.5], [1.5, -0.5, -0.5, -0.5]]
    assert ADVANTAGES["group_mean"](REWARDS).tolist() == expected


def test_rloo() -> None:
    # 1 - (0 + 0 + 1)/3, 0 - 2/3, ...;  3 - 1, 1 - (3 + 1 + 1)/3
    expected = [[2 / 3, -2 / 3, -2 / 3, 2 / 3], [2.0, -2 / 3, -2 / 3, -2 / 3]]
    values = ADVANTAGES["rloo"](REWARDS)
    torch.testing.assert_close(values, torch.tensor(expected, dtype=torch.float64))


def test_rloo_needs_two() -> None:
    with pytest.raises(ValueError, match="raise samples_per_prompt"):
        ADVANTAGES["rloo"](torch.ones(3, 1))


def test_reinforce_pp() -> None:
    # one scale for both groups: sqrt((1 + 3) / 7)
    scale = math.sqrt(4 / 7) + 1e-6
    values = ADVANTAGES["reinforce_pp"](REWARDS)
    torch.testing.assert_close(values, ADVANTAGES["group_mean"](REWARDS) / scale)


@pytest.mark.parametrize("name", ADVANTAGES)
@pytest.mark.parametrize("reward", [0.1, 0.3, 1e6, 0.0])
def test_equal_rewards_give_exactly_zero(name, reward) -> None:
    """The mean of seven times 0.1 is not 0.1 in float32."""
    rewards = torch.cat([torch.full((1, 7), reward), torch.arange(7.0)[None]])
    values = ADVANTAGES[name](rewards)
    assert values[0].tolist() == [0.0] * 7
    assert values[1].abs().min() < values[1].abs().max()
    assert ADVANTAGES[name](rewards[:1]).tolist() == [[0.0] * 7]


@pytest.mark.parametrize("name", ["group_norm", "group_mean", "reinforce_pp"])
def test_a_single_completion_gives_zero(name) -> None:
    assert ADVANTAGES[name](torch.tensor([[1.0]])).tolist() == [[0.0]]


@pytest.mark.parametrize("name", ADVANTAGES)
def test_integers_and_shapes(name) -> None:
    rewards = torch.tensor([[1, 0, 0, 1]])
    assert torch.equal(ADVANTAGES[name](rewards), ADVANTAGES[name](rewards.float()))
    with pytest.raises(ValueError, match="expected \\[P, G\\]"):
        ADVANTAGES[name](torch.ones(4))
