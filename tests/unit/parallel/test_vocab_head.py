"""The head in tiles, against torch's softmax of whole logits in fp64, and in bf16."""

import math

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_rl.parallel import vocab_head, vocab_tiles
from megatron_rl.parallel.vocab_head import VocabHead, head_values
from tests.support.ranks import run_on_ranks
from tests.support.tiny import cpu_device

#: 37 words, and three rows of padding whose logits would be the largest.
TOKENS, WORDS, ROWS, HIDDEN = 23, 37, 40, 16
#: Logits of a tile: a word, five words (the last tile is short), all words.
TILES = (1, 5 * TOKENS, 1 << 20)
ENTROPIES = ("none", "detached", "differentiable")


@pytest.fixture(autouse=True)
def world_of_one():
    cpu_device()


@pytest.fixture(params=TILES)
def tile(request, monkeypatch):
    use_tiles(request.param, monkeypatch.setattr)


def use_tiles(size, put=setattr):
    put(vocab_tiles, "LEAST_WORDS", 1)
    put(vocab_tiles, "TILE", {"cpu": size, "cuda": size})


def draw(scale=1.0, dtype=torch.float32, tokens=TOKENS):
    """Hidden states, weight, targets, and the weights of log-probabilities and entropies."""
    generator = torch.Generator().manual_seed(3)
    rows = torch.randn(TOKENS, HIDDEN, generator=generator)
    weight = scale * torch.randn(ROWS, HIDDEN, generator=generator)
    weight[WORDS:] = 50.0 * rows.sum(0)
    targets = torch.randint(WORDS, (TOKENS,), generator=generator)
    losses = torch.randn(2, TOKENS, generator=generator)
    losses[:, ::6] = 0.0  # masked tokens
    rows, targets, losses = rows[:tokens], targets[:tokens], losses[:, :tokens]
    return rows.to(dtype), weight.to(dtype), targets, losses


def whole(rows, weight, targets, losses, temperature, words=WORDS):
    """(log-probabilities, entropies, hits, gradients of both sums in rows and weight) in fp64."""
    rows, weight = (x.double().detach().requires_grad_() for x in (rows, weight))
    logits = rows @ weight[:words].t()
    logprobs = (logits / temperature).log_softmax(-1)
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    picked = logprobs.gather(1, targets[:, None]).squeeze(1)
    (picked * losses[0]).sum().backward(retain_graph=True)
    of_logprobs = rows.grad.clone(), weight.grad.clone()
    (entropy * losses[1]).sum().backward()
    hits = logits.argmax(-1) == targets
    return picked.detach(), entropy.detach(), hits, of_logprobs, (rows.grad, weight.grad)


def tiled(rows, weight, targets, losses, temperature, entropy="none", **options):
    """(the values, gradients in rows and weight)."""
    rows, weight = (x.clone().requires_grad_() for x in (rows, weight))
    head = VocabHead(weight, WORDS, dist.group.WORLD, **options)
    found = head_values(rows, head, targets, temperature, entropy=entropy)
    loss = (found.logprobs * losses[0]).sum()
    if entropy == "differentiable":
        loss = loss + (found.entropy * losses[1]).sum()
    loss.backward()
    return found, (rows.grad, weight.grad)


def distance(found, expected):
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def check(found, expected, tolerance):
    torch.testing.assert_close(found.double(), expected.double(), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("temperature", [1.0, 0.6, 1.7])
@pytest.mark.parametrize("entropy", ENTROPIES)
def test_values_and_gradients_are_those_of_whole_logits(tile, temperature, entropy):
    drawn = draw()
    found, gradients = tiled(*drawn, temperature, entropy)
    logprobs, entropies, hits, of_logprobs, of_both = whole(*drawn, temperature)
    check(found.logprobs.detach(), logprobs, 5e-6)
    assert 0 < hits.sum() and torch.equal(found.hits, hits)
    assert (found.entropy is None) == (entropy == "none")
    if entropy != "none":
        check(found.entropy.detach(), entropies, 5e-6)
        assert found.entropy.requires_grad == (entropy == "differentiable")
    expected = of_both if entropy == "differentiable" else of_logprobs
    for gradient, other in zip(gradients, expected):
        assert distance(gradient, other) < 3e-6
    assert not gradients[1][WORDS:].any()  # padding
    assert not gradients[0][::6].any()  # masked tokens


def test_entropy_changes_no_bit_of_the_rest(tile):
    drawn = draw()
    runs = [tiled(*drawn, 0.7, entropy) for entropy in ENTROPIES]
    for found, _ in runs[1:]:
        assert torch.equal(found.logprobs, runs[0][0].logprobs)
    for gradient, other in zip(runs[0][1], runs[1][1]):
        assert torch.equal(gradient, other)
    assert torch.equal(runs[1][0].entropy, runs[2][0].entropy)


def test_a_forward_pass_without_gradients_gives_the_same_bits(tile):
    rows, weight, targets, losses = draw()
    head = VocabHead(weight, WORDS, dist.group.WORLD)
    with torch.no_grad():
        scored = head_values(rows, head, targets, 0.7)
    assert torch.equal(scored.logprobs, tiled(rows, weight, targets, losses, 0.7)[0].logprobs)


@pytest.mark.parametrize("tokens", [0, 1])
def test_no_token_or_one(tile, tokens):
    drawn = draw(tokens=tokens)
    found, gradients = tiled(*drawn, 0.7, "differentiable")
    logprobs, entropies, _, _, expected = whole(*drawn, 0.7)
    check(found.logprobs.detach(), logprobs, 5e-6)
    check(found.entropy.detach(), entropies, 5e-6)
    for gradient, other in zip(gradients, expected):
        check(gradient, other, 1e-5)
    assert found.hits.shape == (tokens,)


def test_large_logits_do_not_overflow(tile):
    drawn = draw(scale=1e4)
    found, gradients = tiled(*drawn, 1.0, "detached")
    logprobs, _, _, expected, _ = whole(*drawn, 1.0)
    torch.testing.assert_close(found.logprobs.double(), logprobs, atol=0.02, rtol=1e-6)
    assert bool(torch.isfinite(found.entropy).all())
    for gradient, other in zip(gradients, expected):
        assert distance(gradient, other) < 1e-2  # logits of 1e5 have steps of 0.008


def test_a_tie_is_a_hit(tile):
    rows = torch.eye(HIDDEN)[:2]
    weight = torch.zeros(ROWS, HIDDEN)
    weight[3, 0] = weight[30, 0] = weight[WORDS:] = 9.0
    head = VocabHead(weight, WORDS, dist.group.WORLD)
    for target, hits in ((3, [True, True]), (30, [True, True]), (4, [False, True])):
        found = head_values(rows, head, torch.tensor([target, target]), 1.0)
        assert found.hits.tolist() == hits  # of the second row all logits are equal


def test_a_uniform_distribution_has_the_most_entropy_and_no_gradient(tile):
    rows = torch.zeros(2, HIDDEN, requires_grad=True)
    head = VocabHead(torch.randn(ROWS, HIDDEN), 8, dist.group.WORLD)
    targets = torch.zeros(2, dtype=torch.long)
    found = head_values(rows, head, targets, 1.0, entropy="differentiable")
    found.entropy.sum().backward()
    assert found.entropy.tolist() == pytest.approx([math.log(8)] * 2)
    assert found.logprobs.tolist() == pytest.approx([-math.log(8)] * 2)
    assert rows.grad.abs().max().item() == pytest.approx(0, abs=1e-6)


def test_a_frozen_weight_gets_no_gradient(tile):
    rows, weight, targets, losses = draw()
    rows.requires_grad_()
    found = head_values(rows, VocabHead(weight, WORDS, dist.group.WORLD), targets, 0.7)
    (found.logprobs * losses[0]).sum().backward()
    assert weight.grad is None
    assert torch.equal(rows.grad, tiled(rows.detach(), weight, targets, losses, 0.7)[1][0])


def plain_bf16(rows, weight, targets, losses, temperature):
    """The output layer in bf16 with whole logits: each product rounded once, the gradient in the
    logits too, the softmax in fp32.
    """
    logits = (rows @ weight[:WORDS].t()).float().requires_grad_()
    logprobs = (logits / temperature).log_softmax(-1)
    picked = logprobs.gather(1, targets[:, None]).squeeze(1)
    (picked * losses[0]).sum().backward()
    slope = logits.grad.bfloat16()
    gradient = torch.zeros_like(weight)
    gradient[:WORDS] = slope.t() @ rows
    return picked.detach(), slope @ weight[:WORDS], gradient


def in_fp32(rows, weight, targets, losses, temperature):
    """As `whole`, of bf16 values, with the gradients rounded to bf16."""
    logprobs, _, _, gradients, _ = whole(rows, weight, targets, losses, temperature)
    return logprobs, *(gradient.bfloat16() for gradient in gradients)


@pytest.mark.parametrize(("fp32", "plain"), [(False, plain_bf16), (True, in_fp32)])
def test_bf16_is_rounded_where_whole_logits_are(tile, fp32, plain):
    """A number may be rounded the other way, one in thousands; a sum of rounded parts would be off
    by 2e-3.
    """
    drawn = draw(dtype=torch.bfloat16)
    found, gradients = tiled(*drawn, 0.7, fp32=fp32)
    logprobs, *expected = plain(*drawn, 0.7)
    check(found.logprobs.detach(), logprobs, 5e-6)
    assert found.logprobs.dtype == torch.float32
    for gradient, other in zip(gradients, expected):
        assert gradient.dtype == torch.bfloat16
        assert distance(gradient, other) < 2e-4


def test_the_fp32_head_does_not_round_logits():
    drawn = draw(dtype=torch.bfloat16)
    expected = whole(*drawn, 0.7)[0]
    rounded, exact = (tiled(*drawn, 0.7, fp32=fp32)[0].logprobs for fp32 in (False, True))
    assert float((rounded - expected).detach().abs().max()) > 1e-3
    assert float((exact - expected).detach().abs().max()) < 5e-6


def test_logits_of_few_tokens():
    rows, weight, _, _ = draw(dtype=torch.bfloat16)
    for fp32, dtype in ((False, torch.bfloat16), (True, torch.float32)):
        logits = VocabHead(weight, WORDS, dist.group.WORLD, fp32=fp32).logits(rows)
        assert logits.dtype == dtype and logits.shape == (TOKENS, ROWS)
        assert bool((logits[:, WORDS:].float() < -9e8).all())
        expected = (rows.double() @ weight.double().t())[:, :WORDS]
        check(logits[:, :WORDS], expected, 5e-6 if fp32 else 8e-3)


@pytest.mark.parametrize("entropy", ENTROPIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_tile_that_is_kept_gives_the_bits_of_one_made_again(monkeypatch, entropy, dtype):
    """Also in a second backward pass: the first leaves it as it is."""
    rows, weight, targets, losses = draw(dtype=dtype)
    kept_tiles, gradients_of = [], vocab_head.head_gradients

    def watched(tiles, slope, weight, kept):
        kept_tiles.append(kept)
        return gradients_of(tiles, slope, weight, kept if len(kept_tiles) < 3 else None)

    monkeypatch.setattr(vocab_head, "head_gradients", watched)
    found = []
    for number in range(3):
        if number != 1:
            leaves = [x.clone().requires_grad_() for x in (rows, weight)]
            values = head_values(
                leaves[0],
                VocabHead(leaves[1], WORDS, dist.group.WORLD),
                targets,
                0.7,
                entropy=entropy,
            )
            loss = (values.logprobs * losses[0]).sum()
            if entropy == "differentiable":
                loss = loss + (values.entropy * losses[1]).sum()
        found.append(torch.autograd.grad(loss, leaves, retain_graph=True))
    assert all(kept.shape == (TOKENS, WORDS) for kept in kept_tiles)
    for gradients in found[:2]:
        for gradient, expected in zip(gradients, found[2]):
            assert expected.any() and torch.equal(gradient, expected)


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operator makes."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.untyped_storage().nbytes() // 4)
        return result


@pytest.mark.parametrize("entropy", ENTROPIES)
def test_no_tensor_is_larger_than_a_tile(monkeypatch, entropy):
    use_tiles(64 * 20, monkeypatch.setattr)
    rows, weight = torch.randn(64, 2, requires_grad=True), torch.randn(500, 2, requires_grad=True)
    targets = torch.randint(500, (64,))
    with Largest() as largest:
        head = VocabHead(weight, 500, dist.group.WORLD)
        found = head_values(rows, head, targets, 1.0, entropy=entropy)
        (found.logprobs + (found.entropy if entropy == "differentiable" else 0)).sum().backward()
    assert largest.elements == 64 * 20  # whole logits: 64 * 500
    whole_logits = Largest()
    with whole_logits:
        (rows @ weight.t()).log_softmax(-1)
    assert whole_logits.elements == 64 * 500


def on_a_rank(words):
    """Half of the tokens and half of the rows of the weight: values, and gradients of these."""
    use_tiles(5 * TOKENS)
    rows, weight, targets, losses = draw(tokens=22)
    targets = targets % words
    rank, size = dist.get_rank(), dist.get_world_size()
    mine = rows.chunk(size)[rank].clone().requires_grad_()
    shard = weight.chunk(size)[rank].clone().requires_grad_()
    here = min(max(words - rank * len(shard), 0), len(shard))
    head = VocabHead(shard, here, dist.group.WORLD)
    found = head_values(head.gather(mine[:, None]), head, targets, 0.7, entropy="differentiable")
    ((found.logprobs * losses[0]).sum() + (found.entropy * losses[1]).sum()).backward()
    return found.logprobs.detach(), found.entropy.detach(), found.hits, mine.grad, shard.grad


@pytest.mark.parametrize("words", [WORDS, 15])
def test_two_ranks_give_what_one_gives(words):
    """15 words: the second rank has none."""
    rows, weight, targets, losses = draw(tokens=22)
    logprobs, entropies, hits, _, expected = whole(
        rows, weight, targets % words, losses, 0.7, words
    )
    ranks = run_on_ranks(2, on_a_rank, words)
    for rank in ranks:
        check(rank[0], logprobs, 5e-6)
        check(rank[1], entropies, 5e-6)
        assert torch.equal(rank[2], hits)
    for part, gradient in zip((3, 4), expected):
        assert distance(torch.cat([rank[part] for rank in ranks]), gradient) < 3e-6
