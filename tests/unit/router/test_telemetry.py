import pytest
import torch
import torch.distributed as dist

from megatron_rl.router.telemetry import RouterTelemetry
from tests.support.ranks import run_on_ranks

CPU = torch.device("cpu")


def add(telemetry, layer, mask, distance, overlap, entropy, routing_map):
    telemetry.add(
        layer,
        torch.tensor(mask),
        torch.tensor(distance),
        torch.tensor(overlap),
        torch.tensor(entropy),
        torch.tensor(routing_map),
    )


def _on_a_rank():
    """Rank 0 has the first of three layers, rank 1 other tokens of it and the third layer."""
    telemetry = RouterTelemetry(3, 2, CPU)
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
    return telemetry.reduce(dist.group.WORLD)


def test_sums_of_all_ranks_become_means_of_layers_and_of_the_model():
    for metrics in run_on_ranks(2, _on_a_rank):
        assert metrics == pytest.approx(
            {
                "router/distance_mean/layer_00": 1.0,  # (0.5 + 1.5) / 2 tokens
                "router/distance_mean/layer_02": 0.25,
                "router/distance_mean": 0.625,
                "router/top_k_overlap/layer_00": 0.75,
                "router/top_k_overlap/layer_02": 0.5,
                "router/top_k_overlap": 0.625,
                "router/entropy": 0.5,
                "router/load_max_over_mean/layer_00": 1.0,  # loads 1 and 1
                "router/load_max_over_mean/layer_02": 2.0,  # loads 2 and 0
                "router/load_max_over_mean": 1.5,
            }
        )


def _without_tokens():
    return RouterTelemetry(3, 2, CPU).reduce(dist.group.WORLD)


def test_without_a_token_there_are_no_metrics():
    assert run_on_ranks(1, _without_tokens) == [{}]
