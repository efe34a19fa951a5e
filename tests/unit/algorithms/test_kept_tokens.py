"""Log-probabilities over the kept tokens: by hand, and against a softmax over each set."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from megatron_rl.algorithms.kept_tokens import kept_logprobs, kept_sets
from megatron_rl.records import KeptTokens
from megatron_rl.rollout.builtin.sampler import truncated


def sets_of(*sets):
    offsets = np.cumsum([0, *map(len, sets)])
    return KeptTokens(np.array([i for one in sets for i in one], np.int32), offsets)


def test_by_hand():
    # probabilities .5 .25 .15 .1: of the first two tokens kept 2/3 and 1/3; the second is whole
    logits = torch.tensor([[0.5, 0.25, 0.15, 0.1]] * 2).log()
    found, entropy = kept_logprobs(logits, torch.tensor([1, 1]), sets_of([0, 1], []), 1.0)
    assert found.tolist() == pytest.approx([math.log(1 / 3), math.log(0.25)])
    third = -(2 / 3) * math.log(2 / 3) - (1 / 3) * math.log(1 / 3)
    whole = -sum(p * math.log(p) for p in (0.5, 0.25, 0.15, 0.1))
    assert entropy.tolist() == pytest.approx([third, whole])
    alone, entropy = kept_logprobs(logits[:1], torch.tensor([2]), sets_of([2]), 0.5)
    assert alone.tolist() == [0.0] and entropy.tolist() == pytest.approx([0.0])


def test_sets_of_the_sampler():
    probs = torch.tensor([[0.5, 0.1, 0.25, 0.15], [0.25] * 4, [0.97, 0.01, 0.01, 0.01]])
    kept = kept_sets(truncated(probs, 0, 0.7), most=3)
    # the second keeps all four, which are as likely
    assert kept.ids.tolist() == [0, 2, 0] and kept.offsets.tolist() == [0, 2, 2, 3]
    assert kept.ids.dtype == np.int32 and kept.rows().tolist() == [0, 0, 2]
    assert kept_sets(truncated(probs, 0, 0.7), most=1).offsets.tolist() == [0, 0, 0, 1]
    two = kept_sets(truncated(probs, 2, 1.0), most=2)
    assert two.ids.tolist() == [0, 2] and two.offsets.tolist() == [0, 2, 2, 2]  # the others tie


def test_200_ragged_batches_against_a_softmax_over_each_set():
    """Values, entropies and gradients; sets of the sampler's own truncation."""
    truncations, sizes = [(0, 0.6), (3, 1.0), (4, 0.8), (0, 1.0)], set()
    for seed in range(200):
        rng = torch.Generator().manual_seed(seed)
        tokens, vocab = 1 + seed % 5, 7
        temperature = [1.0, 0.7][seed % 2]
        logits = 2 * torch.randn(tokens, vocab, generator=rng, dtype=torch.float64)
        logits.requires_grad_()
        probs = truncated((logits / temperature).softmax(1).detach(), *truncations[seed % 4])
        kept = kept_sets(probs, most=5)
        targets = probs.multinomial(1, generator=rng).squeeze(1)
        found, entropy = kept_logprobs(logits, targets, kept, temperature)
        total = torch.zeros((), dtype=torch.float64)
        for t in range(tokens):
            ids = kept.ids[kept.offsets[t] : kept.offsets[t + 1]].tolist()
            sizes.add(len(ids))
            ids = ids or list(range(vocab))
            exps = {v: torch.exp(logits[t, v] / temperature) for v in ids}
            share = {v: e / sum(exps.values()) for v, e in exps.items()}
            slow = torch.log(share[int(targets[t])])
            slow_entropy = -sum(p * torch.log(p) for p in share.values())
            assert found[t].item() == pytest.approx(slow.item(), abs=1e-12)
            assert entropy[t].item() == pytest.approx(slow_entropy.item(), abs=1e-12)
            total = total + (t + 1) * (slow + 0.5 * slow_entropy)
        weights = torch.arange(1, tokens + 1, dtype=torch.float64)
        (gradient,) = torch.autograd.grad((weights * (found + 0.5 * entropy)).sum(), logits)
        (expected,) = torch.autograd.grad(total, logits)
        torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-12)
    assert sizes >= {0, 1, 2, 3}


def test_the_same_policy_has_a_ratio_of_one_only_over_the_kept_set():
    """What the mask is for: sampler and trainer agree, and the plain ratio is the kept mass."""
    logits = torch.randn(50, 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    logprobs = logits.log_softmax(1)
    probs = truncated(logprobs.exp(), 0, 0.8)
    mass = probs.sum(1)
    targets = probs.argmax(1)
    sampled = logprobs.gather(1, targets[:, None]).squeeze(1) - mass.log()
    kept, _ = kept_logprobs(logits, targets, kept_sets(probs, most=20), 1.0)
    torch.testing.assert_close(kept, sampled)
    plain = logprobs.gather(1, targets[:, None]).squeeze(1)
    torch.testing.assert_close((plain - sampled).exp(), mass)
    assert mass.max() < 0.95


def test_extremes_and_half_precision_stay_finite():
    logits = torch.tensor([[1e4, -1e4, 0.0], [1e4, -1e4, 0.0]], dtype=torch.bfloat16)
    logits.requires_grad_()
    found, entropy = kept_logprobs(logits, torch.tensor([1, 0]), sets_of([0, 1], [0, 2]), 0.5)
    (found.sum() + entropy.sum()).backward()
    assert found.dtype == torch.float32 and found.isfinite().all() and entropy.isfinite().all()
    assert logits.grad.isfinite().all() and found[1].item() == 0


def test_mistakes_are_refused():
    logits = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="found 1 kept sets for 2 tokens"):
        kept_logprobs(logits, torch.tensor([0, 0]), sets_of([0]), 1.0)
    with pytest.raises(ValueError, match="found token 1 outside of the set"):
        kept_logprobs(logits, torch.tensor([0, 2]), sets_of([0], [0, 1]), 1.0)
