"""Initial weights depend on seed and name, not on the layout; views cut and join them."""

import math

import pytest
import torch

from tests.support.ranks import run_on_ranks
from tests.support.tiny import build_tiny, tiny_config

MODEL = {"moe_layer_freq": [0, 1, 1, 1], "num_layers": 4, "shared_expert_ffn_hidden_size": 16}


def _weights(parallel, seed, model=MODEL):
    """On a rank: its weights under global names, made whole over tensor-parallel ranks."""
    from megatron_rl.models.parameters import parameter_views

    groups, _, chunks = build_tiny(tiny_config(parallel=parallel, model=model), seed)
    return {
        view.name: view.gather(
            view.parameter.data if view.expert is None else view.of(view.parameter.data)
        ).clone()
        for view in parameter_views(chunks, groups)
    }


@pytest.fixture(scope="module")
def single():
    return _weights({}, 1)


@pytest.mark.parametrize(
    ("ranks", "parallel"),
    [
        (2, {"expert": 2}),
        (2, {"tensor": 2}),
        (2, {"tensor": 2, "expert_tensor": 2}),
        (2, {"pipeline": 2, "virtual_pipeline": 2}),
    ],
    ids=["expert", "tensor", "expert-tensor", "interleaved"],
)
def test_every_layout_starts_with_the_same_weights(single, ranks, parallel):
    parts = run_on_ranks(ranks, _weights, parallel, 1)
    assert set().union(*parts) == set(single)
    for part in parts:
        for name, weight in part.items():
            assert torch.equal(weight, single[name]), name


def test_tied_embeddings_are_one_weight_on_both_stages():
    model = {**MODEL, "tie_embeddings": True}
    first, last = run_on_ranks(2, _weights, {"pipeline": 2}, 1, model)
    name = "embedding.word_embeddings.weight"
    assert torch.equal(first[name], last[name])
    assert "output_layer.weight" not in last


def test_weights_of_every_matrix_differ_between_seeds_and_between_matrices(single):
    other = _weights({}, 2)
    matrices = {name: weight for name, weight in single.items() if weight.dim() > 1}
    assert not any(torch.equal(weight, other[name]) for name, weight in matrices.items())
    beginnings = [tuple(weight.flatten()[:4].tolist()) for weight in matrices.values()]
    assert len(set(beginnings)) == len(beginnings)


def test_deviation_is_as_asked_and_smaller_where_the_residual_stream_is_written(single):
    total = tiny_config().model.init_std
    assert single["embedding.word_embeddings.weight"].std().item() == pytest.approx(total, rel=0.1)
    written = single["decoder.layers.0.self_attention.linear_proj.weight"].std().item()
    assert written == pytest.approx(total / math.sqrt(8), rel=0.1)
    assert single["decoder.layers.2.input_layernorm.weight"].tolist() == [1.0] * 32


def test_experts_and_layers_have_global_names(single):
    assert single["decoder.layers.3.mlp.experts.2.linear_fc1.weight"].shape == (64, 32)
    assert single["decoder.layers.0.mlp.linear_fc1.weight"].shape == (128, 32)
    names = [name for name in single if ".experts." in name and name.endswith("fc2.weight")]
    assert len(names) == 3 * 4


def _cut(parallel):
    """On a rank: its slice of gate rows 0..7 over up rows 8..15, and of a row-split matrix."""
    from megatron_rl.models.parameters import ParameterView

    groups, _, _ = build_tiny(tiny_config(parallel=parallel))
    rows = torch.arange(16.0)[:, None].expand(16, 3)
    gated = ParameterView(
        "x", torch.nn.Parameter(torch.empty(8, 3)), None, 0, True, groups.tensor, groups.data
    )
    plain = ParameterView(
        "y", torch.nn.Parameter(torch.empty(3, 8)), None, 1, False, groups.tensor, groups.data
    )
    pieces = gated.slice_of(rows), plain.slice_of(rows.T)
    whole = gated.gather(pieces[0]), plain.gather(pieces[1])
    return [p.tolist() for p in (pieces[0][:, 0], pieces[1][0])], [
        torch.equal(whole[0], rows) and torch.equal(whole[1], rows.T),
        tuple(gated.global_shape()) == (16, 3) and tuple(plain.global_shape()) == (3, 16),
    ]


def test_gate_and_up_are_split_each_on_its_own():
    results = run_on_ranks(2, _cut, {"tensor": 2})
    assert results[0][0] == [[0, 1, 2, 3, 8, 9, 10, 11], list(range(8))]
    assert results[1][0] == [[4, 5, 6, 7, 12, 13, 14, 15], list(range(8, 16))]
    assert all(check == [True, True] for _, check in results)
