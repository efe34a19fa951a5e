"""The head over kept words, against the softmax of whole masked logits in fp64."""

import numpy as np
import pytest
import torch
import torch.distributed as dist

from megatron_rl.algorithms.kept_tokens import kept_logprobs
from megatron_rl.parallel import vocab_tiles
from megatron_rl.parallel.kept_words import KeptWords
from megatron_rl.parallel.vocab_head import VocabHead, head_values
from megatron_rl.records import KeptTokens
from tests.support.ranks import run_on_ranks
from tests.support.tiny import cpu_device

HIDDEN = 8


@pytest.fixture(autouse=True)
def world_of_one():
    cpu_device()


def drawn(seed, tokens=None):
    """(rows, weight, targets, kept, temperature, weights of losses, words) of a ragged batch: sets
    of one word, of some and of all words, and in some batches empty ones.
    """
    rng = np.random.default_rng(seed)
    tokens = int(rng.integers(0, 9)) if tokens is None else tokens
    words = 2 * int(rng.integers(2, 20))
    targets = rng.integers(0, words, tokens)
    sets = []
    for target in targets:
        others = np.setdiff1d(np.arange(words), [target])
        size = rng.choice([0, rng.integers(0, words), words - 1])
        ids = np.append(rng.choice(others, size, replace=False), target)
        sets.append([] if seed % 3 == 0 and rng.random() < 0.3 else rng.permutation(ids))
    kept = KeptTokens.of_sizes(
        np.concatenate([np.zeros(0), *sets]), np.array([len(each) for each in sets], dtype=int)
    )
    rows, weight = (torch.from_numpy(rng.normal(size=(n, HIDDEN))) for n in (tokens, words))
    losses = torch.from_numpy(rng.normal(size=(2, tokens)))
    losses[:, ::3] = 0.0
    temperature = float(rng.choice([0.5, 1.0, 1.7]))
    return rows, weight, torch.from_numpy(targets), kept, temperature, losses


def dense(rows, weight, targets, kept, temperature, losses):
    """(log-probabilities, entropies, gradients of both sums in rows and weight) in fp64."""
    rows, weight = (x.double().detach().requires_grad_() for x in (rows, weight))
    outside = torch.ones(len(rows), len(weight), dtype=torch.bool)
    for t in range(len(rows)):
        ids = kept.ids[kept.offsets[t] : kept.offsets[t + 1]].tolist()
        outside[t, ids or slice(None)] = False
    logits = (rows @ weight.t() / temperature).masked_fill(outside, -torch.inf)
    logprobs = logits.log_softmax(-1)
    terms = torch.where(outside, 0.0, logprobs.exp() * logprobs.masked_fill(outside, 0.0))
    picked, entropy = logprobs.gather(1, targets[:, None]).squeeze(1), -terms.sum(-1)
    ((picked * losses[0]).sum() + (entropy * losses[1]).sum()).backward()
    return picked.detach(), entropy.detach(), rows.grad, weight.grad


def tiled(rows, weight, targets, kept, temperature, losses, fp32=False):
    rows, weight = (x.clone().requires_grad_() for x in (rows, weight))
    head = VocabHead(weight, len(weight), dist.group.WORLD, fp32=fp32)
    words = KeptWords.of(kept, torch.device("cpu"))
    found = head_values(rows, head, targets, temperature, entropy="differentiable", kept=words)
    ((found.logprobs * losses[0]).sum() + (found.entropy * losses[1]).sum()).backward()
    return found.logprobs.detach(), found.entropy.detach(), rows.grad, weight.grad


def check(found, expected, tolerance=2e-5):
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.double(), other.double(), atol=tolerance, rtol=tolerance)


def use_tiles(size, put):
    put(vocab_tiles, "LEAST_WORDS", 1)
    put(vocab_tiles, "TILE", {"cpu": size, "cuda": size})


def test_values_and_gradients_are_those_of_masked_logits(monkeypatch):
    narrow = 0
    for seed in range(200):
        use_tiles((1, 40, 1 << 20)[seed // 3 % 3], monkeypatch.setattr)
        rows, weight, targets, kept, temperature, losses = drawn(seed)
        batch = (rows.float(), weight.float(), targets, kept, temperature, losses)
        found, expected = tiled(*batch), dense(*batch)
        check(found, expected)
        words = KeptWords.of(kept, torch.device("cpu")).words
        if words is not None and len(rows):
            narrow += len(words) < len(weight)
            unused = np.setdiff1d(np.arange(len(weight)), kept.ids)
            assert not found[3][unused].any()
    assert narrow > 20  # batches in which some words are no token's


def test_the_log_probabilities_and_entropies_are_those_of_the_formula():
    rows, weight, targets, kept, temperature, losses = drawn(7, tokens=30)
    logprobs, entropy = kept_logprobs(rows @ weight.t(), targets, kept, temperature)
    found = tiled(rows.float(), weight.float(), targets, kept, temperature, losses)
    check(found[:2], (logprobs, entropy))


def test_a_token_that_keeps_itself_alone_is_certain():
    rows, weight, targets, _, _, losses = drawn(1, tokens=4)
    kept = KeptTokens.of_sizes(targets.numpy(), np.ones(4, dtype=int))
    logprobs, entropy, of_rows, of_weight = tiled(
        rows.float(), weight.float(), targets, kept, 1.0, losses
    )
    assert not logprobs.any() and not entropy.any()
    assert not of_rows.any() and not of_weight.any()


def test_bf16_rounds_what_the_whole_output_layer_rounds():
    """The fp32 head differs from it, and is closer to fp64."""
    batch = drawn(11, tokens=60)
    rows, weight = (x.bfloat16() for x in batch[:2])
    expected = dense(rows, weight, *batch[2:])
    logits = (rows @ weight.t()).double() / batch[4]
    whole, _ = kept_logprobs(logits, batch[2], batch[3], 1.0)
    rounded, exact = (tiled(rows, weight, *batch[2:], fp32=fp32) for fp32 in (False, True))
    check(rounded[:1], (whole,))
    errors = [(one[0] - expected[0]).abs().max() for one in (rounded, exact)]
    assert errors[1] < 2e-5 < errors[0]


def halves(seed):
    """On a rank: what its half of the words gives; the gradient in the rows is summed."""
    rows, weight, targets, kept, temperature, losses = drawn(seed)
    size, rank = dist.get_world_size(), dist.get_rank()
    rows = rows.float().requires_grad_()
    shard = weight.float().chunk(size)[rank].clone().requires_grad_()
    head = VocabHead(shard, len(shard), dist.group.WORLD)
    words = KeptWords.of(kept, torch.device("cpu"))
    found = head_values(rows, head, targets, temperature, entropy="differentiable", kept=words)
    ((found.logprobs * losses[0]).sum() + (found.entropy * losses[1]).sum()).backward()
    dist.all_reduce(rows.grad)
    return found.logprobs.detach(), found.entropy.detach(), rows.grad, shard.grad


def of_halves():
    use_tiles(24, setattr)
    return [halves(seed) for seed in range(12)]


def test_ranks_with_half_of_the_words_agree():
    both = run_on_ranks(2, of_halves)
    for seed, (one, other) in enumerate(zip(*both, strict=True)):
        expected = dense(*drawn(seed))
        check((*one[:3], torch.cat([one[3], other[3]])), expected)
        check(other[:3], expected[:3])
