"""What is said of the routers is the same under any layout, whatever the loss.

(`test_layouts.py` compares the same numbers under rspo, where there is a trace as well.)
"""

import functools

import pytest

from tests.support import layouts
from tests.support.layouts import Case
from tests.support.ranks import run_on_ranks

#: A loss without router shift: no trace, no distance.
GRPO = {"name": "grpo"}
#: All there is, and a token-wise clip that cuts many tokens.
RSPO = {"name": "rspo", "settings": {"clip_low": 0.01, "clip_high": 0.01}}


def _telemetry(case: Case) -> dict:
    """On a rank: the router metrics of three updates."""
    from megatron_rl.config.algorithm import keeps_trace
    from megatron_rl.policy.score import score
    from megatron_rl.policy.update import update
    from megatron_rl.router.telemetry import RouterTelemetry

    with layouts.policy_of(layouts.layout_config(case)) as policy:
        model = policy.config.model
        telemetry = RouterTelemetry(
            model.num_layers, model.num_experts, policy.device.torch_device, floor=0.98
        )
        batches = layouts.packed_mini_batches(policy, layouts.rollout_batch(case))
        with_traces = keeps_trace(policy.config.algorithm)
        batches = [score(policy, packs, with_traces=with_traces) for packs in batches]
        for items in batches:
            layouts.observed_update(policy, items, telemetry, update)
        return telemetry.reduce(policy.groups.world)


@functools.cache
def single(name: str) -> dict:
    algorithm = {"grpo": GRPO, "rspo": RSPO}[name]
    return run_on_ranks(1, _telemetry, Case("one", 1, {}, algorithm=algorithm))[0]


@pytest.mark.parametrize("algorithm", [GRPO, RSPO], ids=["grpo", "rspo"])
@pytest.mark.parametrize(
    ("ranks", "parallel"),
    [
        (2, {"tensor": 2}),
        (2, {"expert": 2}),
        (2, {"expert": 2, "expert_exchange": "weights"}),
        (2, {"context": 2}),
        (2, {"pipeline": 2, "virtual_pipeline": 2}),
        pytest.param(2, {"expert_tensor": 2}, marks=pytest.mark.slow),
        pytest.param(4, {"tensor": 2, "pipeline": 2, "expert": 2}, marks=pytest.mark.slow),
        pytest.param(4, {"tensor": 2, "context": 2}, marks=pytest.mark.slow),
        pytest.param(2, {"recompute": "full"}, marks=pytest.mark.slow),
    ],
    ids=[
        "TP2",
        "EP2",
        "EP2, weights",
        "CP2",
        "PP2 VPP2",
        "ETP2",
        "TP2 PP2 EP2",
        "TP2 CP2",
        "DP2 recompute",
    ],
)
def test_the_numbers_are_those_of_a_single_process(ranks, parallel, algorithm):
    expected = single(algorithm["name"])
    results = run_on_ranks(ranks, _telemetry, Case("", ranks, parallel, algorithm=algorithm))
    for found in results:
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_every_loss_has_load_and_entropy_of_every_layer():
    names = {"router/entropy", "router/load_max_over_mean"}
    expected = names | {f"{name}/layer_{layer:02d}" for name in names for layer in range(4)}
    assert {name for name in single("grpo") if not name.startswith("weights/")} == expected
    assert single("grpo")["router/load_max_over_mean"] > 1.0
    assert 0.0 < single("grpo")["router/entropy"] < 2.08  # log 8 experts


def test_with_router_shift_there_is_more():
    metrics = single("rspo")
    for layer in range(4):
        for name in ("distance_mean", "distance_max", "raw_gamma_mean", "top_k_overlap", "entropy"):
            assert metrics[f"router/{name}/layer_{layer:02d}"] > 0
        assert (
            metrics[f"router/distance_max/layer_{layer:02d}"]
            > (metrics[f"router/distance_mean/layer_{layer:02d}"])
        )
    assert 0 < metrics["router/floor_fraction/layer_03"] < 1
    quarters = [metrics[f"clip_fraction/gamma_q{n}"] for n in (1, 2, 3, 4)]
    assert quarters[0] > quarters[3]  # tokens whose routers moved are clipped more often
    assert max(quarters) > 0.3
