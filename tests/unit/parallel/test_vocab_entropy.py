"""The differentiable entropy of vocab_logprobs, against torch's autograd, whole and sharded."""

import math

import pytest
import torch
import torch.distributed as dist

from megatron_rl.parallel import vocab_logprobs as module
from megatron_rl.parallel.vocab_logprobs import vocab_logprobs
from tests.support.ranks import run_on_ranks
from tests.support.tiny import cpu_device

TOKENS, VOCAB, TEMPERATURE = 23, 38, 0.7


def draw(dtype=torch.float32):
    """Logits, targets and the weights of log-probabilities and entropies in a loss."""
    generator = torch.Generator().manual_seed(3)
    logits = 4 * torch.randn(TOKENS, VOCAB, generator=generator)
    targets = torch.randint(VOCAB, (TOKENS,), generator=generator)
    weights = torch.randn(2, TOKENS, generator=generator)
    weights[:, ::6] = 0.0  # masked tokens
    return logits.to(dtype), targets, weights


def reference(logits, targets, weights):
    """Entropies and the gradient of both sums by torch's autograd in double precision."""
    wide = logits.double().requires_grad_()
    logprobs = (wide / TEMPERATURE).log_softmax(-1)
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    picked = logprobs.gather(1, targets[:, None]).squeeze(1)
    (picked * weights[0] + entropy * weights[1]).sum().backward()
    return entropy.detach(), wide.grad


def measured(logits, targets, weights, group):
    leaf = logits.clone().requires_grad_()
    logprobs, entropy = vocab_logprobs(
        leaf, targets, TEMPERATURE, group, differentiable_entropy=True
    )
    (logprobs * weights[0] + entropy * weights[1]).sum().backward()
    return entropy.detach(), leaf.grad


@pytest.mark.parametrize("chunk", [1 << 20, 5 * VOCAB, 1])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 5e-6), (torch.bfloat16, 8e-3)])
def test_entropy_and_its_gradient_are_autograds(monkeypatch, chunk, dtype, tolerance):
    cpu_device()
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", chunk)
    logits, targets, weights = draw(dtype)
    entropy, gradient = measured(logits, targets, weights, dist.group.WORLD)
    expected, slope = reference(logits, targets, weights)
    assert gradient.dtype == dtype
    torch.testing.assert_close(entropy.double(), expected, rtol=5e-6, atol=5e-6)
    torch.testing.assert_close(gradient.double(), slope, rtol=tolerance, atol=tolerance)
    assert slope[weights[1] != 0].abs().amax(dim=1).min() > 1e-3


def test_the_option_changes_no_bit_of_the_rest():
    cpu_device()
    logits, targets, weights = draw()
    plain = logits.clone().requires_grad_()
    logprobs, entropy = vocab_logprobs(plain, targets, TEMPERATURE, dist.group.WORLD)
    assert not entropy.requires_grad
    (logprobs * weights[0]).sum().backward()
    other = logits.clone().requires_grad_()
    same_logprobs, same_entropy = vocab_logprobs(
        other, targets, TEMPERATURE, dist.group.WORLD, differentiable_entropy=True
    )
    assert torch.equal(logprobs, same_logprobs) and torch.equal(entropy, same_entropy)
    (same_logprobs * weights[0]).sum().backward()
    torch.testing.assert_close(other.grad, plain.grad, rtol=1e-6, atol=1e-7)


def test_a_uniform_distribution_has_the_most_entropy_and_no_gradient():
    cpu_device()
    logits = torch.zeros(2, 8, requires_grad=True)
    _, entropy = vocab_logprobs(
        logits, torch.zeros(2, dtype=torch.long), 1.0, dist.group.WORLD, differentiable_entropy=True
    )
    entropy.sum().backward()
    assert entropy.tolist() == pytest.approx([math.log(8)] * 2)
    assert logits.grad.abs().max().item() == pytest.approx(0, abs=1e-7)


def on_a_shard():
    logits, targets, weights = draw()
    shard = VOCAB // dist.get_world_size()
    mine = logits[:, dist.get_rank() * shard :][:, :shard].contiguous()
    return measured(mine, targets, weights, dist.group.WORLD)


def test_shards_of_the_vocabulary_give_the_same():
    cpu_device()
    entropy, gradient = measured(*draw(), dist.group.WORLD)
    answers = run_on_ranks(2, on_a_shard)
    for found, _ in answers:
        torch.testing.assert_close(found, entropy, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        torch.cat([g for _, g in answers], 1), gradient, rtol=1e-4, atol=1e-6
    )
