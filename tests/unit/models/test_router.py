"""The losses on the router are means over real tokens, and its counts leave padding out."""

import pytest
import torch

from tests.support.tiny import build_tiny, tiny_config

EXPERTS, TOP_K, WIDTH = 4, 2, 32
REAL, ROOM = 13, 20


def build(**model):
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

    _, _, (chunk,) = build_tiny(tiny_config(model=model))
    MoEAuxLossAutoScaler.main_loss_backward_scale = torch.ones(1)
    return chunk.decoder.layers[0].mlp.router


def inputs():
    generator = torch.Generator().manual_seed(4)
    hidden = torch.randn(ROOM, 1, WIDTH, generator=generator)
    return hidden, (torch.arange(ROOM) >= REAL)[:, None]


def balancing_loss(scores, counts, tokens):
    """n * E / (n^2 K) * sum_e P_e f_e with P_e, f_e sums over n real tokens."""
    return tokens * EXPERTS / (tokens**2 * TOP_K) * sum(p * f for p, f in zip(scores, counts))


def expected_gradient(weight, hidden, score, aux, z):
    """Of aux * balancing loss + z * sum logsumexp^2, written out in double."""
    wide = weight.detach().double().requires_grad_()
    logits = hidden[:REAL, 0].double() @ wide.T
    scores = logits.softmax(-1) if score == "softmax" else logits.sigmoid()
    scores = scores / scores.sum(-1, keepdim=True)
    chosen = scores.topk(TOP_K, dim=1).indices
    counts = [float((chosen == expert).sum()) for expert in range(EXPERTS)]
    loss = aux * balancing_loss(scores.sum(0), counts, REAL)
    loss = loss + z * sum(torch.logsumexp(row, 0) ** 2 for row in logits)
    loss.backward()
    return wide.grad


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize(("aux", "z"), [(0.3, 0.0), (0.0, 0.2), (0.3, 0.2)])
def test_gradient_is_that_of_the_formula_over_real_tokens(score, aux, z):
    from megatron_rl.models.router import set_router_loss_scale

    router = build(router_score=score, aux_loss_coeff=aux, z_loss_coeff=z)
    set_router_loss_scale([router], 2.5)
    hidden, padding = inputs()
    probs, _ = router(hidden, padding)
    (0.0 * probs.sum()).backward()
    expected = 2.5 * expected_gradient(router.weight, hidden, score, aux, z)
    torch.testing.assert_close(router.weight.grad.double(), expected, atol=1e-5, rtol=1e-4)


def test_a_row_of_padding_gives_no_gradient():
    router = build(aux_loss_coeff=0.3, z_loss_coeff=0.2)
    hidden, _ = inputs()
    probs, _ = router(hidden, torch.ones(ROOM, 1, dtype=torch.bool))
    (0.0 * probs.sum()).backward()
    assert router.weight.grad.abs().max() == 0.0


def test_without_a_gradient_nothing_is_added():
    router = build(aux_loss_coeff=0.3, z_loss_coeff=0.2)
    hidden, padding = inputs()
    with torch.no_grad():
        probs, _ = router(hidden, padding)
    assert not probs.requires_grad
    router.eval()
    probs, _ = router(hidden, padding)
    (0.0 * probs.sum()).backward()
    assert router.weight.grad.abs().max() == 0.0


def test_expert_counts_leave_padding_out():
    router = build(router_score="sigmoid", router_expert_bias=True)
    hidden, padding = inputs()
    _, routing_map = router(hidden, padding)
    expected = [int(routing_map[:REAL, expert].sum()) for expert in range(EXPERTS)]
    assert router.local_tokens_per_expert.tolist() == expected
    assert sum(expected) == REAL * TOP_K
    with torch.no_grad():
        router(hidden, padding)
    assert router.local_tokens_per_expert.tolist() == expected


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_a_token_that_stands_for_several_counts_as_often(score):
    """Gradients of both losses and the load, as of a row in which it is repeated."""
    from megatron_rl.models.router import set_router_loss_scale

    counts = torch.tensor([3, 1, 1, 2, 1, 4, 1] + [0] * 3)
    hidden = inputs()[0][: len(counts)]
    found = []
    for repeated in (True, False):
        router = build(
            router_score=score,
            aux_loss_coeff=0.3,
            z_loss_coeff=0.2,
            router_expert_bias=score == "sigmoid",
            expert_bias_update_rate=0.01 if score == "sigmoid" else 0.0,
        )
        set_router_loss_scale([router], 2.5)
        router.counts = None if repeated else counts
        rows = hidden.repeat_interleave(counts, dim=0) if repeated else hidden
        padding = None if repeated else (counts == 0)[:, None]
        probs, _ = router(rows, padding)
        (0.0 * probs.sum()).backward()
        found.append((router.weight.grad, getattr(router, "local_tokens_per_expert", None)))
    (expected, load), (gradient, counted) = found
    torch.testing.assert_close(gradient, expected, atol=1e-5, rtol=1e-5)
    assert score == "softmax" or counted.tolist() == load.tolist() != [0] * EXPERTS


def test_a_layer_takes_counts_in_the_place_of_a_padding_mask():
    """The layer's output is the same; only what the router adds up is not."""
    _, _, (chunk,) = build_tiny(tiny_config(model={"aux_loss_coeff": 0.3}))
    layer = chunk.decoder.layers[0].mlp
    hidden, padding = inputs()
    counts = torch.where(padding[:, 0], 0, 2)[None]
    plain, _ = layer(hidden, padding_mask=padding.T)
    assert layer.router.counts is None
    counted, _ = layer(hidden, padding_mask=counts)
    assert torch.equal(layer.router.counts, counts[0]) and torch.equal(plain, counted)
    layer(hidden)
    assert layer.router.counts is None
