"""How the layers' distances become one: by hand, by the definition, and over pipeline stages."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_rl.algorithms.layer_rules import LAYERS, layer_rule
from megatron_rl.algorithms.router_shift import shift_weight

#: Five layers, one token.
DISTANCES = torch.tensor([[0.4], [0.1], [0.3], [0.2], [0.5]])


def quantile_of(distances: torch.Tensor, quantile: float) -> torch.Tensor:
    rule = layer_rule("quantile", quantile)
    return rule.total(rule.running(distances))


def test_gamma_of_the_rules_by_hand() -> None:
    for layers, exponent in (("mean", 0.3), ("max", 0.5), ("quantile", 0.4), ("last", 0.5)):
        rule = layer_rule(layers, 0.8)
        distance = rule.total(rule.running(DISTANCES))
        gamma = shift_weight(distance, rule.divisor(5), 0.0)
        assert gamma.tolist() == pytest.approx([math.exp(-exponent)])


def test_quantile_by_hand() -> None:
    for quantile, expected in {
        0.01: 0.1,
        0.2: 0.1,
        0.21: 0.2,
        0.6: 0.3,
        0.9: 0.5,
        1.0: 0.5,
    }.items():
        assert quantile_of(DISTANCES, quantile).tolist() == pytest.approx([expected])


@pytest.mark.parametrize("num_layers", [1, 4, 10, 48, 100])
def test_quantile_matches_the_definition(num_layers) -> None:
    """The least distance that at least the share q of the layers do not exceed."""
    rng = torch.Generator().manual_seed(num_layers)
    distances = torch.rand(num_layers, 7, generator=rng)
    for hundredths in (1, 7, 10, 29, 50, 57, 90, 99, 100):
        found = quantile_of(distances, hundredths / 100)
        for row, value in zip(distances.T.tolist(), found.tolist()):
            enough = [d for d in row if 100 * sum(e <= d for e in row) >= hundredths * num_layers]
            assert value == min(enough)
    assert torch.equal(quantile_of(distances, 1.0), distances.amax(0))


def test_a_quantile_of_no_layer_or_outside_its_range_is_refused() -> None:
    for distances, quantile in ((torch.zeros(0, 3), 0.5), (DISTANCES, 0.0), (DISTANCES, 1.5)):
        with pytest.raises(ValueError, match="expected one in"):
            quantile_of(distances, quantile)


@pytest.mark.parametrize("layers", LAYERS)
@pytest.mark.parametrize("sizes", [(5,), (1, 4), (0, 2, 0, 3), (2, 3, 0)])
def test_stages_join_to_the_whole(layers, sizes) -> None:
    """Also where a stage has no MoE layer; a row count is known before the value is."""
    rule = layer_rule(layers, 0.7)
    rng = torch.Generator().manual_seed(0)
    distances = torch.randint(1, 99, (5, 6), generator=rng).double()  # sums of these are exact
    running = rule.running(distances[:0])
    assert running.shape == (rule.rows(0), 6)
    done = 0
    for part in distances.split(sizes):
        done += len(part)
        running = rule.join(running, rule.running(part))
        assert running.shape == (rule.rows(done), 6)
    expected = {"mean": distances.sum(0), "max": distances.amax(0)}
    expected |= {"quantile": distances.sort(0).values[3], "last": distances[4]}
    assert torch.equal(rule.total(running), expected[layers])
    assert torch.equal(rule.total(rule.running(distances)), expected[layers])


def test_an_unknown_rule_is_refused() -> None:
    with pytest.raises(ValueError, match="found layers 'median'; expected one of mean, max, quant"):
        layer_rule("median")
