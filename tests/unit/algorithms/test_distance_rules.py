"""Which experts count in a distance: by hand, and on random routers by the definition."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_rl.algorithms.distance_rules import DISTANCES, distance_rule, weighted_distance
from megatron_rl.algorithms.router_shift import shift_distance


def test_by_hand() -> None:
    # old scores .5 .3 .1 .1, top 2: 0, 1;  new .5 .1 .3 .1, top 2: 0, 2
    old = torch.tensor([[0.5, 0.3, 0.1, 0.1]]).log()
    new = torch.tensor([[0.5, 0.1, 0.3, 0.1]]).log()
    ids, chosen = torch.tensor([[0, 1]]), torch.tensor([[True, False, True, False]])
    log3 = math.log(3)
    two = (new[:, :2], old[:, :2], ids, chosen)
    assert distance_rule("top_k").distance(*two).tolist() == pytest.approx([log3 / 2])
    assert distance_rule("gate_weighted").distance(*two).tolist() == pytest.approx(
        [0.3 / 0.8 * log3]
    )
    found = distance_rule("union").distance(new, old, ids, chosen)
    assert found.tolist() == pytest.approx([2 * log3 / 3])
    # the highest old score is the second of the two: 0.5 -> 0.5, whatever their order
    turned = (new[:, [1, 0]], old[:, [1, 0]], ids, chosen)
    assert distance_rule("top_k", 1).distance(*turned).tolist() == pytest.approx([0.0])
    assert distance_rule("top_k", 2).distance(*turned).tolist() == pytest.approx([log3 / 2])
    with pytest.raises(ValueError, match="found 2 experts; expected at least 3"):
        distance_rule("top_k", 3).distance(*turned)


def test_the_highest_experts_on_200_random_routers() -> None:
    for seed in range(200):
        rng = torch.Generator().manual_seed(seed)
        new, old = torch.randn(2, 7, 4, generator=rng, dtype=torch.float64)
        new.requires_grad_()
        count, ids = 1 + seed % 4, torch.zeros(7, 4, dtype=torch.int64)
        found = distance_rule("top_k", count).distance(new, old, ids, ids.bool())
        total = torch.zeros((), dtype=torch.float64)
        for t in range(7):
            highest = sorted(range(4), key=lambda k: -float(old[t, k]))[:count]
            distance = sum(abs(new[t, k] - old[t, k]) for k in highest) / count
            assert found[t].item() == pytest.approx(distance.item(), rel=1e-12)
            total = total + distance
        (gradient,) = torch.autograd.grad(found.sum(), new, retain_graph=True)
        (expected,) = torch.autograd.grad(total, new)
        torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("name", DISTANCES)
def test_200_random_routers_by_the_definition(name) -> None:
    """Values and gradients; E 3 to 8, K 1 to 3."""
    rule, entered = distance_rule(name), 0
    for seed in range(200):
        rng = torch.Generator().manual_seed(seed)
        tokens, experts, k = 5, 3 + seed % 6, 1 + seed % 3
        logits = torch.randn(2, tokens, experts, generator=rng, dtype=torch.float64)
        old = logits[0].log_softmax(1)
        new = (logits[0] + logits[1]).log_softmax(1).requires_grad_()
        ids, now = old.topk(k).indices, new.topk(k).indices
        chosen = torch.zeros(tokens, experts, dtype=torch.bool).scatter(1, now, True)
        sides = (new, old) if rule.every_expert else (new.gather(1, ids), old.gather(1, ids))
        found = rule.distance(*sides, ids, chosen)
        total = torch.zeros((), dtype=torch.float64)
        for t in range(tokens):
            counted = set(ids[t].tolist())
            entered += len(set(now[t].tolist()) - counted)
            if name == "union":
                counted |= set(now[t].tolist())
            weight = {e: math.exp(old[t, e]) if name == "gate_weighted" else 1.0 for e in counted}
            moved = sum(w * abs(new[t, e] - old[t, e]) for e, w in weight.items())
            distance = moved / sum(weight.values())
            assert found[t].item() == pytest.approx(distance.item(), rel=1e-12)
            total = total + distance
        (gradient,) = torch.autograd.grad(found.sum(), new, retain_graph=True)
        (expected,) = torch.autograd.grad(total, new)
        torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-13)
    assert entered > 200


@pytest.mark.parametrize("name", DISTANCES)
def test_unmoved_routers_are_at_exactly_zero(name) -> None:
    rule = distance_rule(name)
    old = torch.randn(4, 6, generator=torch.Generator().manual_seed(0)).log_softmax(1)
    ids = old.topk(2).indices
    chosen = torch.zeros(4, 6, dtype=torch.bool).scatter(1, ids, True)
    scored = old if rule.every_expert else old.gather(1, ids)
    assert rule.distance(scored, scored.clone(), ids, chosen).tolist() == [0.0] * 4


def test_equal_weights_are_the_papers_distance() -> None:
    new, old = torch.randn(2, 7, 3, generator=torch.Generator().manual_seed(1))
    expected = shift_distance(new[:, None], old[:, None])
    torch.testing.assert_close(weighted_distance(new, old, torch.full((7, 3), 0.3)), expected)


def test_an_unknown_distance_is_refused() -> None:
    with pytest.raises(ValueError, match="found distance 'topk'; expected one of top_k, gate_w"):
        distance_rule("topk")
