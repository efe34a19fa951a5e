import pytest
import torch
import torch.distributed as dist

from megatron_rl.parallel import vocab_logprobs as module
from megatron_rl.parallel.vocab_logprobs import vocab_hits, vocab_logprobs
from tests.support.ranks import run_on_ranks
from tests.support.tiny import cpu_device

TOKENS, VOCAB = 23, 37


@pytest.fixture(autouse=True)
def world_of_one():
    cpu_device()


@pytest.fixture
def small_chunks(monkeypatch):
    """Five tokens a chunk: the last chunk is a short one."""
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", 5 * VOCAB)


def draw(dtype=torch.float32, scale=4.0):
    generator = torch.Generator().manual_seed(3)
    logits = scale * torch.randn(TOKENS, VOCAB, generator=generator)
    targets = torch.randint(VOCAB, (TOKENS,), generator=generator)
    weights = torch.randn(TOKENS, generator=generator)
    weights[::6] = 0.0  # masked tokens
    return logits.to(dtype).requires_grad_(), targets, weights


def reference(logits, targets, weights, temperature):
    """torch's own softmax in double precision: values, entropy, gradient of a weighted sum."""
    wide = logits.detach().double().requires_grad_()
    logprobs = (wide / temperature).log_softmax(-1)
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    picked = logprobs.gather(1, targets[:, None]).squeeze(1)
    (picked * weights).sum().backward()
    return picked.detach(), entropy.detach(), wide.grad


def check(found, expected, tolerance):
    torch.testing.assert_close(found.double(), expected.double(), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("temperature", [1.0, 0.6, 1.7])
def test_values_entropy_and_gradient_are_those_of_log_softmax(small_chunks, temperature):
    logits, targets, weights = draw()
    logprobs, entropy = vocab_logprobs(logits, targets, temperature, dist.group.WORLD)
    (logprobs * weights).sum().backward()
    values, entropies, gradient = reference(logits, targets, weights, temperature)
    check(logprobs.detach(), values, 2e-6)
    check(entropy, entropies, 5e-6)
    check(logits.grad, gradient, 1e-6)
    assert not entropy.requires_grad


def test_chunks_change_nothing(monkeypatch):
    logits, targets, weights = draw()
    results = []
    for elements in (1, 7 * VOCAB, 1 << 20):
        monkeypatch.setattr(module, "CHUNK_ELEMENTS", elements)
        logits.grad = None
        logprobs, entropy = vocab_logprobs(logits, targets, 0.8, dist.group.WORLD)
        (logprobs * weights).sum().backward()
        results.append((logprobs.detach(), entropy, logits.grad))
    for result in results[1:]:
        for found, expected in zip(result, results[0]):
            check(found, expected, 1e-6)


def test_bf16_logits_are_computed_in_fp32(small_chunks):
    logits, targets, weights = draw(torch.bfloat16)
    logprobs, entropy = vocab_logprobs(logits, targets, 0.7, dist.group.WORLD)
    (logprobs * weights).sum().backward()
    values, entropies, gradient = reference(logits, targets, weights, 0.7)
    assert logprobs.dtype == entropy.dtype == torch.float32
    check(logprobs.detach(), values, 5e-6)
    check(entropy, entropies, 5e-6)
    assert logits.grad.dtype == torch.bfloat16
    check(logits.grad, gradient, 4e-3)  # rounded once, to bf16


def test_large_logits_do_not_overflow(small_chunks):
    logits, targets, weights = draw(scale=3e4)
    logprobs, entropy = vocab_logprobs(logits, targets, 1.0, dist.group.WORLD)
    (logprobs * weights).sum().backward()
    values, _, gradient = reference(logits, targets, weights, 1.0)
    check(logprobs.detach(), values, 1e-5)
    check(logits.grad, gradient, 1e-5)
    assert bool(torch.isfinite(entropy).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_of_the_vocabulary_but_the_logits_is_kept(dtype):
    logits, targets, _ = draw(dtype)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        vocab_logprobs(logits, targets, 0.5, dist.group.WORLD)
    large = [tensor for tensor in kept if tensor.numel() > TOKENS]
    assert [tensor.data_ptr() for tensor in large] == [logits.data_ptr()]


def _on_a_shard(temperature):
    """On a rank: this rank's slice of values, entropy, gradient."""
    module.CHUNK_ELEMENTS = 5 * VOCAB
    logits, targets, weights = draw()
    logits = logits[:, :36]
    targets = targets.clamp(max=35)
    rank, size = dist.get_rank(), dist.get_world_size()
    shard = logits.detach().chunk(size, dim=1)[rank].clone().requires_grad_()
    logprobs, entropy = vocab_logprobs(shard, targets, temperature, dist.group.WORLD)
    (logprobs * weights).sum().backward()
    return logprobs.detach(), entropy, shard.grad


def test_a_split_vocabulary_gives_the_same():
    parts = run_on_ranks(2, _on_a_shard, 0.8)
    logits, targets, weights = draw()
    values, entropies, gradient = reference(logits[:, :36], targets.clamp(max=35), weights, 0.8)
    for logprobs, entropy, _ in parts:
        check(logprobs, values, 2e-6)
        check(entropy, entropies, 5e-6)
    check(torch.cat([part[2] for part in parts], dim=1), gradient, 1e-6)


def test_hits_are_targets_with_the_largest_logit(small_chunks):
    logits, targets, _ = draw()
    logits = logits.detach()
    targets[::2] = logits[::2].argmax(-1)
    expected = targets == logits.argmax(-1)
    assert 0 < expected.sum() < TOKENS
    assert torch.equal(vocab_hits(logits, targets, dist.group.WORLD), expected)
    logits[3, (targets[3] + 1) % VOCAB] = logits[3, targets[3]] = 99.0  # a tie is a hit
    assert vocab_hits(logits, targets, dist.group.WORLD)[3]


def _hits_on_a_shard():
    module.CHUNK_ELEMENTS = 5 * VOCAB
    logits = draw()[0].detach()[:, :36]
    targets = torch.where(torch.arange(TOKENS) % 2 > 0, logits.argmax(-1), 0)
    shard = logits.chunk(dist.get_world_size(), dim=1)[dist.get_rank()]
    hits = vocab_hits(shard, targets, dist.group.WORLD)
    return torch.equal(hits, targets == logits.argmax(-1)) and 0 < hits.sum() < TOKENS


def test_a_split_vocabulary_gives_the_same_hits():
    assert run_on_ranks(2, _hits_on_a_shard) == [True, True]
