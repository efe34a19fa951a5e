import pytest

from tests.support.layouts import Case, layout_config, policy_of
from tests.support.ranks import run_on_ranks


def _described(parallel, model):
    with policy_of(layout_config(Case("x", 2, parallel, model))) as policy:
        layers = [[layer.layer_number for layer in chunk.decoder.layers] for chunk in policy.chunks]
        places = [policy.chunk_index(wrapped) for wrapped in policy.wrapped]
        return policy.num_moe_layers, layers, places


@pytest.mark.parametrize(
    ("frequency", "expected"), [(1, 4), (2, 2), (3, 2), ([0, 1, 1, 1], 3), ([0, 0, 0, 1], 1)]
)
def test_moe_layers_are_counted_over_all_stages(frequency, expected):
    parallel = {"pipeline": 2, "virtual_pipeline": 2}
    first, last = run_on_ranks(2, _described, parallel, {"moe_layer_freq": frequency})
    assert first == (expected, [[1], [3]], [0, 1])
    assert last == (expected, [[2], [4]], [0, 1])


def test_a_frozen_router_asks_for_no_gradient():
    with policy_of(layout_config(Case("one", 1, {}, {"freeze_router": True}))) as policy:
        frozen = {n for n, p in policy.chunks[0].named_parameters() if not p.requires_grad}
    assert frozen == {f"decoder.layers.{layer}.mlp.router.weight" for layer in range(4)}
