"""Copies of tokens for their experts, against loops, and whole layers against Megatron's own."""

import pytest
import torch

from tests.support.ranks import run_on_ranks
from tests.support.tiny import build_tiny, cpu_device, tiny_config


@pytest.fixture(autouse=True)
def megatron():
    cpu_device()


def test_by_hand():
    """Token 0 goes to experts 1 and 2, token 1 to 0 and 2: rows are 1 | 0 | 0, 1."""
    from megatron_rl.models.dispatch import Copies

    copies = Copies(torch.tensor([[False, True, True], [True, False, True]]), 2)
    assert copies.tokens.tolist() == [1, 0, 0, 1]
    assert copies.rows.tolist() == [[1, 2], [0, 3]]
    tokens = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    assert copies.spread(tokens).tolist() == [[3, 4], [1, 2], [1, 2], [3, 4]]
    rows = torch.tensor([[1.0], [10.0], [100.0], [1000.0]])
    assert copies.add_up(rows).tolist() == [[110.0], [1001.0]]
    weights = torch.tensor([[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]])
    assert copies.weights(weights).tolist() == pytest.approx([0.4, 0.2, 0.3, 0.6])


@pytest.mark.parametrize("top_k", [1, 2, 4])
@pytest.mark.parametrize("num_tokens", [0, 1, 9])
def test_values_and_gradients_are_those_of_loops(top_k, num_tokens):
    from megatron_rl.models.dispatch import Copies

    experts, width = 5, 3
    generator = torch.Generator().manual_seed(10 * num_tokens + top_k)
    scores = torch.rand(num_tokens, experts, generator=generator)
    chosen = torch.zeros(num_tokens, experts, dtype=torch.bool)
    chosen.scatter_(1, scores.topk(top_k, dim=1).indices, True)
    copies = Copies(chosen, top_k)
    pairs = [(t, e) for e in range(experts) for t in range(num_tokens) if chosen[t, e]]
    assert copies.tokens.tolist() == [t for t, _ in pairs]

    def random(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.double).requires_grad_()

    tokens, rows = random(num_tokens, width), random(len(pairs), width)
    probs = random(num_tokens, experts)
    if pairs:
        assert torch.equal(copies.spread(tokens), torch.stack([tokens[t] for t, _ in pairs]))
        assert torch.equal(copies.weights(probs), torch.stack([probs[p] for p in pairs]))
    for t in range(num_tokens):
        of_token = sum(rows[n] for n, pair in enumerate(pairs) if pair[0] == t)
        torch.testing.assert_close(copies.add_up(rows)[t], of_token)
    for function, argument in (
        (copies.spread, tokens),
        (copies.add_up, rows),
        (copies.weights, probs),
    ):
        assert torch.autograd.gradcheck(function, argument)


LAYOUTS = [
    (1, {}),
    (2, {"expert": 2}),
    (2, {"tensor": 2, "expert_tensor": 2}),
    (2, {"tensor": 2, "expert": 2, "expert_tensor": 1}),
]


def _layer(parallel):
    """On a rank: output and gradients of one MoE layer with our dispatcher, and with Megatron's."""
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher

    from megatron_rl.models.dispatch import GatheringDispatcher

    groups, config, (chunk,) = build_tiny(tiny_config(parallel=parallel))
    layer = chunk.decoder.layers[0].mlp
    assert type(layer.token_dispatcher) is GatheringDispatcher
    results = []
    for kind in (GatheringDispatcher, MoEAlltoAllTokenDispatcher):
        layer.token_dispatcher = kind(
            layer.num_local_experts,
            layer.local_expert_indices,
            config=config,
            pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
        )
        generator = torch.Generator().manual_seed(torch.distributed.get_rank())
        x = torch.randn(10, 1, 32, generator=generator).requires_grad_()
        grad = torch.randn(10, 1, 32, generator=generator)
        layer.zero_grad(set_to_none=True)
        output, bias = layer(x)
        assert bias is None
        output.backward(grad)
        gradients = [parameter.grad for parameter in layer.parameters()]
        results.append([t.numpy() for t in (output.detach(), x.grad, *gradients)])
    return results


@pytest.mark.parametrize(("ranks", "parallel"), LAYOUTS)
def test_a_layer_is_the_one_with_megatrons_dispatcher(ranks, parallel):
    for ours, theirs in run_on_ranks(ranks, _layer, parallel):
        assert len(ours) == len(theirs) == 5  # output, input, router, two weights of the experts
        for a, b in zip(ours, theirs):
            assert abs(b).max() > 0
            assert abs(a - b).max() <= 2e-6 * abs(b).max()
