"""Router shift by hand and by layers."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_rl.algorithms.router_shift import (
    layer_divisor,
    layer_quantile,
    over_layers,
    shift_distance,
    shift_metrics,
    shift_weight,
)

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
    distances = torch.tensor([[0.4, 0.1, 0.3, 0.2, 0.5]])
    for quantile, expected in {
        0.01: 0.1,
        0.2: 0.1,
        0.21: 0.2,
        0.6: 0.3,
        0.9: 0.5,
        1.0: 0.5,
    }.items():
        assert layer_quantile(distances, quantile).tolist() == pytest.approx([expected])
    assert shift_weight(layer_quantile(distances, 0.6), layer_divisor(5, "quantile"), 0.0) == (
        pytest.approx(math.exp(-0.3))
    )


@pytest.mark.parametrize("num_layers", [1, 4, 10, 48, 100])
def test_quantile_matches_the_definition(num_layers) -> None:
    """The least distance that at least the share q of the layers do not exceed."""
    rng = torch.Generator().manual_seed(num_layers)
    distances = torch.rand(7, num_layers, generator=rng)
    for hundredths in (1, 7, 10, 29, 50, 57, 90, 99, 100):
        found = layer_quantile(distances, hundredths / 100)
        for row, value in zip(distances.tolist(), found.tolist()):
            enough = [d for d in row if 100 * sum(e <= d for e in row) >= hundredths * num_layers]
            assert value == min(enough)
    assert torch.equal(layer_quantile(distances, 1.0), over_layers(distances, "max"))


def test_a_quantile_of_no_layer_or_outside_its_range_is_refused() -> None:
    for distances, quantile in ((torch.zeros(3, 0), 0.5), (NEW[0], 0.0), (NEW[0], 1.5)):
        with pytest.raises(ValueError, match="expected one in"):
            layer_quantile(distances, quantile)


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


def test_metrics() -> None:
    weight = shift_weight(torch.tensor([0.0, 0.1, 9.0, 9.0]), 1, 0.8)
    metrics = shift_metrics(weight, 0.8, torch.tensor([True, True, True, False]))
    total, count = metrics["router/gamma_mean"]
    assert (total / count).item() == pytest.approx((1 + math.exp(-0.1) + 0.8) / 3)
    assert [v.item() for v in metrics["router/floor_fraction"]] == [1.0, 3.0]


def test_mistakes_are_refused() -> None:
    with pytest.raises(ValueError, match="one shape"):
        shift_distance(NEW, OLD[:, :1])
    with pytest.raises(ValueError, match="one shape"):
        shift_distance(NEW[0], OLD[0])
    with pytest.raises(ValueError, match="found floor=1.5"):
        shift_weight(torch.zeros(1), 1, 1.5)
    with pytest.raises(ValueError, match="found num_layers=0"):
        shift_weight(torch.zeros(1), 0, 0.8)
