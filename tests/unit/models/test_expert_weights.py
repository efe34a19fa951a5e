"""Copies of all experts for a pass: how they are put together, and a layer that has them."""

import pytest
import torch

from tests.support.ranks import run_on_ranks
from tests.support.tiny import build_tiny, cpu_device, tiny_config


@pytest.fixture(autouse=True)
def megatron():
    cpu_device()


def test_put_together_by_hand():
    """Two experts with a gate and an up of two rows each, every expert sliced over two ranks."""
    from megatron_rl.models.expert_weights import put_together, take_apart

    # rows of rank 0: gate 0 and up 0 of expert 0; of rank 1: gate 1 and up 1; then expert 1
    up = torch.tensor([[[0, 2]], [[1, 3]], [[10, 12]], [[11, 13]]]).view(4, 1, 2, 1)
    whole = put_together(up, 2, gated=True)
    assert whole.tolist() == [[[0], [1], [2], [3]], [[10], [11], [12], [13]]]
    assert torch.equal(take_apart(whole, 4, 2, gated=True), up)
    down = torch.tensor([0, 1, 10, 11]).view(4, 1, 1, 1)
    whole = put_together(down, 2, gated=False)
    assert whole.tolist() == [[[0, 1]], [[10, 11]]]
    assert torch.equal(take_apart(whole, 4, 2, gated=False), down)


@pytest.mark.parametrize(("ranks", "slices"), [(1, 1), (3, 1), (2, 2), (6, 3)])
@pytest.mark.parametrize("gated", [False, True])
def test_a_place_is_where_a_loop_finds_it(ranks, slices, gated):
    from megatron_rl.models.expert_weights import put_together, take_apart

    local, rows, columns = 2, 4, 5
    parts = torch.arange(ranks * local * rows * columns).view(ranks, local, rows, columns)
    whole = put_together(parts, slices, gated=gated)
    assert whole.shape == (
        ranks // slices * local,
        rows * slices if gated else rows,
        columns if gated else columns * slices,
    )
    half = rows // 2
    for r, e, i, j in torch.cartesian_prod(*map(torch.arange, parts.shape)).tolist():
        piece, expert = r % slices, r // slices * local + e
        row = i // half * half * slices + piece * half + i % half if gated else i
        column = j if gated else piece * columns + j
        assert whole[expert, row, column] == parts[r, e, i, j]
    back = take_apart(whole, ranks, slices, gated=gated)
    assert back.is_contiguous() and torch.equal(back, parts)


LAYOUTS = [
    (2, {"expert": 2}),
    (2, {"tensor": 2, "expert_tensor": 2}),
    (4, {"expert": 2, "expert_tensor": 2}),
]


def _layer(parallel, dtype):
    """On a rank: output and gradients of a MoE layer after two backward passes, tokens travelling
    and weights travelling; and the collectives that the passes of the second made.
    """
    from unittest import mock

    import torch.distributed as dist

    groups, _, chunks = build_tiny(tiny_config(parallel=parallel, model={"dtype": dtype}))
    from megatron_rl.models.expert_weights import ExpertWeights, can_gather

    assert can_gather(chunks)
    layer = chunks[0].decoder.layers[0].mlp
    weights = ExpertWeights(chunks, groups)
    own = [layer.experts.linear_fc1.weight, layer.experts.linear_fc2.weight]
    generator = torch.Generator().manual_seed(dist.get_rank())
    batches = [torch.randn(2, 10, 1, 32, generator=generator).to(own[0].dtype) for _ in range(2)]

    def passes():
        outputs = []
        for x, grad in batches:
            leaf = x.clone().requires_grad_()
            output, _ = layer(leaf)
            output.backward(grad)
            outputs += [output.detach(), leaf.grad]
        return outputs

    results = []
    layer.zero_grad(set_to_none=True)
    for chunk in chunks:
        for weight in chunk.parameters():
            weight.main_grad = torch.zeros_like(weight, dtype=torch.float32)
    found = passes()
    results.append([*found, *(weight.grad for weight in own)])
    layer.zero_grad(set_to_none=True)
    names = ("all_to_all_single", "all_gather_into_tensor", "all_gather", "all_reduce")
    with weights.gathered(backwards=2):
        with mock.patch.multiple(dist, **{n: mock.Mock(wraps=getattr(dist, n)) for n in names}):
            found = passes()
            calls = {name: getattr(dist, name).call_count for name in names}
        weights.reduce()
    assert all(weight.grad is None for weight in own)
    results.append([*found, *(weight.main_grad for weight in own)])
    again, _ = layer(batches[0][0])  # tokens travel again
    results.append([again.detach()])
    return [[t.float().numpy() for t in tensors] for tensors in results], calls


@pytest.mark.parametrize(("ranks", "parallel"), LAYOUTS)
def test_a_layer_is_the_one_whose_tokens_travel(ranks, parallel):
    for (tokens, weights, after), calls in run_on_ranks(ranks, _layer, parallel, "fp32"):
        assert len(tokens) == len(weights) == 6
        for a, b in zip(weights, tokens):
            assert abs(b).max() > 0
            assert abs(a - b).max() <= 2e-6 * abs(b).max()
        assert (after[0] == tokens[0]).all()
        # The layer itself sends nothing but the sums of gradients, one message a matrix.
        assert calls["all_to_all_single"] == 2
        assert calls["all_gather_into_tensor"] == calls["all_gather"] == calls["all_reduce"] == 0


def test_in_bf16_gradients_are_added_up_in_fp32():
    """Each product is rounded to bf16, their sums are not."""
    for (tokens, weights, _), _ in run_on_ranks(2, _layer, {"expert": 2}, "bf16"):
        for a, b in zip(weights[-2:], tokens[-2:]):
            assert abs(a - b).max() <= 0.02 * abs(b).max()
            as_bf16 = torch.from_numpy(a).bfloat16().float().numpy()
            assert (a != as_bf16).mean() > 0.3


def _untouched(parallel):
    """On a rank: the gradients of two layers of which the pass has run the first."""
    import torch.distributed as dist

    groups, _, chunks = build_tiny(tiny_config(parallel=parallel))
    from megatron_rl.models.expert_weights import ExpertWeights

    first, second = (layer.mlp for layer in chunks[0].decoder.layers)
    for weight in chunks[0].parameters():
        weight.main_grad = torch.zeros_like(weight)
    weights = ExpertWeights(chunks, groups)
    with weights.gathered(backwards=1):
        x = torch.ones(4, 1, 32) * (1 + dist.get_rank())
        first(x)[0].sum().backward()
        weights.reduce()
    return [float(m.experts.linear_fc2.weight.main_grad.abs().sum()) for m in (first, second)]


def test_a_layer_without_a_gradient_gets_zeros():
    found = run_on_ranks(2, _untouched, {"expert": 2})
    assert sum(first for first, _ in found) > 0
    assert [second for _, second in found] == [0.0, 0.0]
