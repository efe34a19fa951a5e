"""Router shift by hand and by layers."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_rl.algorithms.router_shift import shift_distance, shift_weight

NEW = torch.tensor([[[-1.0, -2.0], [-1.0, -1.0]], [[-3.0, -3.0], [-0.5, -0.5]]])
OLD = torch.tensor([[[-1.5, -1.0], [-1.0, -3.0]], [[-3.0, -3.0], [-0.5, -0.5]]])


def test_distance_by_hand() -> None:
    # token 0: (0.5 + 1)/2 + (0 + 2)/2;  token 1 has not moved
    assert shift_distance(NEW, OLD).tolist() == [1.75, 0.0]
    assert shift_distance(OLD, NEW).tolist() == [1.75, 0.0]


def test_distance_matches_loops_and_stages_add_up() -> None:
    rng = torch.Generator().manual_seed(0)
    new, old = torch.randn(2, 5, 4, 3, generator=rng, dtype=torch.float64)
    slow = [
        sum(
            sum(abs(new[t, layer, k] - old[t, layer, k]).item() for k in range(3)) / 3
            for layer in range(4)
        )
        for t in range(5)
    ]
    whole = shift_distance(new, old)
    torch.testing.assert_close(whole, torch.tensor(slow, dtype=torch.float64))
    stages = shift_distance(new[:, :1], old[:, :1]) + shift_distance(new[:, 1:], old[:, 1:])
    torch.testing.assert_close(stages, whole)


def test_stage_without_moe_layer_adds_nothing() -> None:
    assert shift_distance(NEW[:, :0], OLD[:, :0]).tolist() == [0.0, 0.0]


def test_quantile_by_hand() -> None:
    # token 0: layers 0.75 and 1.0;  token 1: 0 and 0
    assert shift_distance(NEW, OLD, "quantile", 0.5).tolist() == [0.75, 0.0]
    assert shift_distance(NEW, OLD, "quantile", 0.51).tolist() == [1.0, 0.0]


def test_distance_of_bfloat16_is_taken_in_float32() -> None:
    new, old = NEW.bfloat16(), (NEW + 0.01).bfloat16()
    distance = shift_distance(new, old)
    assert distance.dtype == torch.float32
    assert torch.equal(distance, shift_distance(new.float(), old.float()))


def test_weight_by_hand() -> None:
    distance = torch.tensor([0.0, 0.2, 1.75], dtype=torch.float64)
    weight = shift_weight(distance, num_layers=2, floor=0.8)
    assert weight.tolist() == pytest.approx([1.0, math.exp(-0.1), 0.8])
    assert shift_weight(distance, 2, 0.0)[2].item() == pytest.approx(math.exp(-0.875))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_weight_is_exactly_one_where_nothing_moved(dtype) -> None:
    new = torch.randn(9, 4, 3, dtype=dtype)
    weight = shift_weight(shift_distance(new, new.clone()), 4, 0.8)
    assert torch.equal(weight, torch.ones(9, dtype=dtype))


def test_weight_is_detached_and_finite() -> None:
    distance = torch.tensor([0.1, 1e30], requires_grad=True)
    weight = shift_weight(distance, 1, 0.0)
    assert not weight.requires_grad
    assert weight[1].item() == 0.0


def test_mistakes_are_refused() -> None:
    with pytest.raises(ValueError, match="one shape"):
        shift_distance(NEW, OLD[:, :1])
    with pytest.raises(ValueError, match="one shape"):
        shift_distance(NEW[0], OLD[0])
    with pytest.raises(ValueError, match="found floor=1.5"):
        shift_weight(torch.zeros(1), 1, 1.5)
    with pytest.raises(ValueError, match="found num_layers=0"):
        shift_weight(torch.zeros(1), 0, 0.8)
