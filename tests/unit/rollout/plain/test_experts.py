"""Router and experts against Megatron's router and against a loop over tokens."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from tests.support.tiny import cpu_device

TOKENS, EXPERTS, WIDTH, INNER = 37, 8, 8, 4


@pytest.fixture(autouse=True)
def megatron():
    cpu_device()


ROUTINGS = [
    (4, "softmax", False, None, None, None),
    (2, "softmax", True, None, None, 1.5),
    (4, "softmax", True, 4, 2, None),
    (3, "sigmoid", False, None, None, 2.5),
    (1, "sigmoid", False, None, None, None),
    (3, "sigmoid", False, 4, 2, 2.5),
    (4, "sigmoid", False, 2, 1, None),
]


@pytest.mark.parametrize(
    ("routing", "biased"),
    [(routing, False) for routing in ROUTINGS]
    + [(routing, True) for routing in ROUTINGS if routing[1] == "sigmoid"],
)
def test_the_choice_is_megatrons(routing, biased):
    from megatron.core.transformer.moe.moe_utils import topk_routing_with_score_function

    from megatron_rl.rollout.builtin.plain.experts import Routing, choose

    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(TOKENS, EXPERTS, generator=generator) * 2
    bias = torch.randn(EXPERTS, generator=generator) * 0.3 if biased else None
    top_k, score, pre_softmax, groups, group_top_k, factor = routing
    expected, chosen = topk_routing_with_score_function(
        logits,
        top_k,
        use_pre_softmax=pre_softmax,
        num_groups=groups,
        group_topk=group_top_k,
        scaling_factor=factor,
        score_function=score,
        expert_bias=bias,
    )
    ids, weights = choose(logits, bias, Routing(*routing))
    found = torch.zeros(TOKENS, EXPERTS).scatter(1, ids, weights)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)
    assert torch.equal(torch.zeros_like(chosen).scatter(1, ids, True), chosen)


def slow_mixture(x, router, up, down, shared, gate, top_k):
    """Token by token, expert by expert."""
    rows = []
    for token in x:
        logits = router @ token
        best = sorted(range(EXPERTS), key=lambda e: -logits[e])[:top_k]
        weights = torch.softmax(logits[best], 0)
        out = torch.zeros(WIDTH)
        for weight, expert in zip(weights, best):
            gates, ups = (up[expert] @ token).split(INNER)
            out += weight * (down[expert] @ (F.silu(gates) * ups))
        gates, ups = (shared[0] @ token).split(INNER)
        rows.append(out + torch.sigmoid(gate @ token) * (shared[1] @ (F.silu(gates) * ups)))
    return torch.stack(rows)


def drawn(seed, tokens):
    """x, router, up, down, (up, down) and gate of the shared expert."""
    generator = torch.Generator().manual_seed(seed)
    make = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    x, router = make(tokens, WIDTH), make(EXPERTS, WIDTH)
    up, down = make(EXPERTS, 2 * INNER, WIDTH), make(EXPERTS, WIDTH, INNER)
    shared, gate = (make(2 * INNER, WIDTH), make(WIDTH, INNER)), make(1, WIDTH)
    return x, router, up, down, shared, gate


@pytest.mark.parametrize("bounds", [(0, 8), (0, 3, 8), (0, 1, 2, 8)])
@pytest.mark.parametrize("tokens", [1, TOKENS])
@pytest.mark.parametrize("threads", [1, 2])
def test_parts_of_the_experts_add_up_to_a_loop_over_tokens(bounds, tokens, threads, monkeypatch):
    """Also where no token goes to an expert, and where none goes to those held."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    from megatron_rl.rollout.builtin.plain.experts import Routing, mixture
    from megatron_rl.rollout.builtin.plain.weights import Dense, Mixture

    x, router, up, down, shared, gate = drawn(2, tokens)
    routing = Routing(2, "softmax", False, None, None, None)
    total = torch.zeros(tokens, WIDTH)
    for first, end in itertools.pairwise(bounds):
        held = Mixture(router, None, up[first:end], down[first:end], first, None, None)
        if first == 0:  # the shared expert's part of a sum is a rank's own
            held = Mixture(router, None, up[:end], down[:end], 0, Dense(*shared), gate)
        part, (ids, _) = mixture(x, held, routing)
        total += part
        assert torch.equal(ids, (x @ router.T).topk(2).indices)
    expected = slow_mixture(x, router, up, down, shared, gate, 2)
    torch.testing.assert_close(total, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("threads", "ids", "held", "expected"),
    [
        (2, [[0, 1], [0, 2], [3, 0]], 4, 3),
        (1, [[0, 1], [0, 2], [3, 0]], 4, None),  # one thread shares no product
        (2, [[0, 1], [0, 2], [3, 0]], 3, None),  # others hold the rest
        (2, [[0, 1]] * 16, 4, 16),  # 64 places, twice the pairs
        (2, [[0, 1]] * 16, 5, None),  # 80
        (2, [[0, 1]] * 192, 4, None),  # 96 pairs of an expert
        (2, [], 4, None),
    ],
)
def test_when_experts_multiply_as_one_padded_batch(threads, ids, held, expected, monkeypatch):
    from megatron_rl.rollout.builtin.plain.experts import longest_if_padded
    from megatron_rl.rollout.builtin.plain.weights import Mixture

    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    router = torch.zeros(max(held, 4), WIDTH)
    up, down = torch.zeros(held, 2 * INNER, WIDTH), torch.zeros(held, WIDTH, INNER)
    weights = Mixture(router, None, up, down, 0, None, None)
    chosen = torch.tensor(ids, dtype=torch.int64).view(-1, 2)
    assert longest_if_padded(chosen, weights) == expected


@pytest.mark.parametrize("threads", [1, 2])
def test_experts_run_on_some_tokens_and_the_router_on_all(threads, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    from megatron_rl.rollout.builtin.plain.experts import Routing, mixture
    from megatron_rl.rollout.builtin.plain.weights import Dense, Mixture

    x, router, up, down, shared, gate = drawn(3, TOKENS)
    held = Mixture(router, None, up, down, 0, Dense(*shared), gate)
    keep = torch.tensor([36, 4, 11])
    found, (ids, _) = mixture(x, held, Routing(2, "softmax", False, None, None, None), keep)
    assert torch.equal(ids, (x @ router.T).topk(2).indices)
    expected = slow_mixture(x[keep], router, up, down, shared, gate, 2)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
