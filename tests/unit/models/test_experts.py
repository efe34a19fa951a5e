"""Grouped experts against a loop over experts, and against Megatron's own in checkpoints."""

import pytest
import torch
import torch.nn.functional as F

from tests.support.ranks import run_on_ranks
from tests.support.tiny import build_tiny, tiny_config


@pytest.fixture(scope="module")
def experts():
    _, _, (chunk,) = build_tiny(tiny_config())
    return chunk.decoder.layers[0].mlp.experts


def slow_experts(fc1, fc2, x, counts, probs):
    """Token by token: down(silu(gate x) * up x * p)."""
    rows, start = [], 0
    for expert, count in enumerate(counts):
        for t in range(start, start + count):
            gate, up = (fc1[expert] @ x[t]).chunk(2)
            rows.append(fc2[expert] @ (F.silu(gate) * up * probs[t]))
        start += count
    return torch.stack(rows) if rows else x[:0]


@pytest.fixture(params=["one by one", "grouped"])
def way(request, monkeypatch):
    """Both ways of a CPU, whatever the number of rows."""
    from megatron_rl.models import experts

    monkeypatch.setattr(experts, "ROWS_OF_ITS_OWN", 0 if request.param == "one by one" else 2**40)


@pytest.mark.parametrize("counts", [[3, 4, 1, 2], [0, 5, 0, 2], [7, 0, 0, 0], [0, 0, 0, 0]])
def test_values_and_gradients_are_those_of_a_loop(experts, counts, way):
    generator = torch.Generator().manual_seed(sum(counts))
    tokens = sum(counts)
    x = torch.randn(tokens, 32, generator=generator).requires_grad_()
    probs = torch.rand(tokens, generator=generator).requires_grad_()
    weights = torch.randn(tokens, 32, generator=generator)
    experts.zero_grad(set_to_none=True)
    output, bias = experts(x, torch.tensor(counts), probs)
    assert bias is None
    (output * weights).sum().backward()

    leaves = [x, probs, experts.linear_fc1.weight, experts.linear_fc2.weight]
    wide_x, wide_probs, fc1, fc2 = (t.detach().double().requires_grad_() for t in leaves)
    expected = slow_experts(fc1, fc2, wide_x, counts, wide_probs)
    torch.testing.assert_close(output.double(), expected, atol=1e-5, rtol=1e-5)
    (expected * weights).sum().backward()
    for leaf, reference in zip(leaves, (wide_x, wide_probs, fc1, fc2)):
        wanted = torch.zeros_like(reference) if reference.grad is None else reference.grad
        torch.testing.assert_close(leaf.grad.double(), wanted, atol=1e-5, rtol=1e-5)


def test_only_what_is_trained_gets_a_gradient(experts, way):
    """A frozen matrix has none, and the others' do not depend on it."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(9, 32, generator=generator).requires_grad_()
    probs, counts = torch.rand(9, generator=generator), torch.tensor([4, 0, 2, 3])
    up, down = experts.linear_fc1.weight, experts.linear_fc2.weight
    found = []
    for frozen in ([], [up], [down], [up, down]):
        for weight in (up, down):
            weight.requires_grad_(not any(weight is one for one in frozen))
            weight.grad = None
        x.grad = None
        experts(x, counts, probs)[0].square().sum().backward()
        found.append([x.grad, up.grad, down.grad])
    for weight in (up, down):
        weight.requires_grad_(True)
    whole = found[0]
    assert [[grad is None for grad in grads[1:]] for grads in found[1:]] == [
        [True, False], [False, True], [True, True]
    ]  # fmt: skip
    for grads in found[1:]:
        for grad, expected in zip(grads, whole):
            assert grad is None or torch.equal(grad, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_are_added_where_megatron_keeps_them(dtype):
    """Only of weights that are marked, of the type of the sum; else autograd gets them."""
    from megatron_rl.models.experts import GRADIENT_IN_PLACE, _OneByOne

    generator = torch.Generator().manual_seed(1)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=dtype)  # noqa: E731
    x, up, down, probs = draw(9, 4), draw(3, 6, 4), draw(3, 4, 3), draw(9)
    passes = [([4, 0, 5], draw(9, 4)), ([1, 6, 2], draw(9, 4))]

    def train(mark):
        weights = [torch.nn.Parameter(weight.clone()) for weight in (up, down)]
        for weight in weights:
            weight.main_grad = torch.ones(weight.shape)
            setattr(weight, GRADIENT_IN_PLACE, mark)
        for counts, grad in passes:
            _OneByOne.apply(x, *weights, probs, counts).backward(grad)
        return weights

    wanted = [weight.grad for weight in train(False)]
    for weight, expected in zip(train(True), wanted):
        if dtype == torch.float32:
            assert weight.grad is None
            torch.testing.assert_close(weight.main_grad - 1.0, expected, atol=1e-5, rtol=1e-5)
        else:
            assert torch.equal(weight.grad, expected)
            assert torch.equal(weight.main_grad, torch.ones(weight.shape))


def _shards(parallel):
    """On a rank: (key, global shape, offset, size) of checkpoint shards, ours and Megatron's."""
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer.mlp import MLPSubmodules
    from megatron.core.transformer.moe.experts import SequentialMLP

    _, config, (chunk,) = build_tiny(tiny_config(parallel=parallel))
    ours = chunk.decoder.layers[0].mlp.experts
    submodules = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    theirs = SequentialMLP(ours.num_local_experts, config, submodules, groups)
    return [_described(module.sharded_state_dict("mlp.experts.")) for module in (ours, theirs)]


def _described(state):
    from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensorFactory

    result = []
    for entry in state.values():
        if isinstance(entry, ShardedObject):  # Transformer Engine's extra state, empty here
            continue
        parts = entry.build() if isinstance(entry, ShardedTensorFactory) else [entry]
        parts = list(parts.values()) if isinstance(parts, dict) else parts
        for part in parts:
            offset, size = tuple(part.global_offset), part.data.numel()
            result.append((part.key, tuple(part.global_shape), offset, size))
    return result


@pytest.mark.parametrize(
    ("ranks", "parallel"), [(1, {}), (2, {"expert": 2}), (2, {"tensor": 2, "expert_tensor": 2})]
)
def test_checkpoint_keys_and_global_shapes_are_those_of_megatrons_experts(ranks, parallel):
    for ours, theirs in run_on_ranks(ranks, _shards, parallel):
        assert {shard[:2] for shard in ours} == {shard[:2] for shard in theirs}
        assert sum(shard[3] for shard in ours) == sum(shard[3] for shard in theirs)
        # A shard of ours begins where one of Megatron's does (which has one for each expert).
        assert {shard[::2] for shard in ours} <= {shard[::2] for shard in theirs}
