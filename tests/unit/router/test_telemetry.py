"""Sums over packs, layers and ranks, against means and maxima worked out by hand."""

import math

import pytest
import torch
import torch.distributed as dist

from megatron_rl.router.telemetry import RouterTelemetry
from tests.support.ranks import run_on_ranks

CPU = torch.device("cpu")


def add(telemetry, layer, mask, distance, overlap, entropy, routing_map):
    mask = torch.tensor(mask)
    telemetry.add_choice(layer, mask, torch.tensor(entropy), torch.tensor(routing_map))
    if distance is not None:
        telemetry.add_shift(layer, mask, torch.tensor(distance), torch.tensor(overlap))


def _on_a_rank():
    """Rank 0 has the first of three layers, rank 1 other tokens of it and the third layer."""
    telemetry = RouterTelemetry(3, 2, CPU, floor=0.7)
    # token weights 2 here, 1 there
    one = [1.0, 2, 4, 1, 1] if dist.get_rank() == 0 else [1.0, 1, 1, 0, 0]
    telemetry.weights[0] += torch.tensor(one)
    if dist.get_rank() == 0:
        add(
            telemetry, 0, [True, False], [0.5, 9.0], [1.0, 0.0], [0.25, 9.0],
            [[True, False], [False, True]],
        )  # fmt: skip
    else:
        add(telemetry, 0, [True], [1.5], [0.5], [0.75], [[False, True]])
        add(
            telemetry, 2, [True, True], [0.5, 0.0], [0.5, 0.5], [0.5, 0.5],
            [[True, False], [True, False]],
        )  # fmt: skip
        telemetry.clip_split.add(
            torch.tensor([2.0, 1.0, 0.5, 0.0]),
            torch.tensor([True, False, True, False]),
            torch.ones(4, dtype=torch.bool),
        )
    return telemetry.reduce(dist.group.WORLD)


def test_sums_of_all_ranks_become_means_of_layers_and_of_the_model():
    for metrics in run_on_ranks(2, _on_a_rank):
        assert metrics == pytest.approx(
            {
                "weights/ess_token": 3**2 / (2 * 5),
                "weights/variance_token": 0.25,
                "router/distance_mean/layer_00": 1.0,  # (0.5 + 1.5) / 2 tokens
                "router/distance_mean/layer_02": 0.25,
                "router/distance_mean": 0.625,
                "router/distance_max/layer_00": 1.5,  # 9.0 is masked
                "router/distance_max/layer_02": 0.5,
                "router/distance_max": 1.5,
                "router/raw_gamma_mean/layer_00": (math.exp(-0.5) + math.exp(-1.5)) / 2,
                "router/raw_gamma_mean/layer_02": (math.exp(-0.5) + 1.0) / 2,
                "router/floor_fraction/layer_00": 1.0,  # exp(-0.5) = 0.61
                "router/floor_fraction/layer_02": 0.5,
                "router/top_k_overlap/layer_00": 0.75,
                "router/top_k_overlap/layer_02": 0.5,
                "router/top_k_overlap": 0.625,
                "router/entropy/layer_00": 0.5,
                "router/entropy/layer_02": 0.5,
                "router/entropy": 0.5,
                "router/load_max_over_mean/layer_00": 1.0,  # loads 1 and 1
                "router/load_max_over_mean/layer_02": 2.0,  # loads 2 and 0
                "router/load_max_over_mean": 1.5,
                "clip_fraction/gamma_q1": 1.0,
                "clip_fraction/gamma_q2": 0.0,
                "clip_fraction/gamma_q3": 1.0,
                "clip_fraction/gamma_q4": 0.0,
            }
        )


def _without_a_trace():
    telemetry = RouterTelemetry(1, 2, CPU)
    add(telemetry, 0, [True, True], None, None, [0.2, 0.4], [[True, False], [False, True]])
    return telemetry.reduce(dist.group.WORLD)


def test_without_a_trace_there_are_load_and_entropy():
    expected = {"router/entropy": 0.3, "router/load_max_over_mean": 1.0}
    expected |= {f"{name}/layer_00": value for name, value in expected.items()}
    assert run_on_ranks(1, _without_a_trace) == [pytest.approx(expected)]


def _without_a_floor():
    telemetry = RouterTelemetry(1, 2, CPU)
    add(telemetry, 0, [True], [50.0], [0.0], [0.2], [[True, False]])
    return telemetry.reduce(dist.group.WORLD)


def test_without_a_floor_nothing_is_said_of_it():
    (metrics,) = run_on_ranks(1, _without_a_floor)
    assert not any("floor" in name for name in metrics)
    assert metrics["router/distance_max/layer_00"] == 50.0


def _without_tokens():
    return RouterTelemetry(3, 2, CPU).reduce(dist.group.WORLD)


def test_without_a_token_there_are_no_metrics():
    assert run_on_ranks(1, _without_tokens) == [{}]


def test_every_name_is_in_the_table():
    from megatron_rl.observe.metric_table import metric

    for name in run_on_ranks(2, _on_a_rank)[0]:
        assert metric(name).verbs == "train"
