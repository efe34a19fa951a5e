"""The output layer in tiles on CUDA, where bf16 is multiplied into fp32, against the CPU."""

import numpy as np
import pytest
import torch
import torch.distributed as dist

from megatron_rl.parallel import vocab_tiles
from megatron_rl.parallel.kept_words import KeptWords
from megatron_rl.parallel.vocab_head import VocabHead, head_values
from megatron_rl.records import KeptTokens
from tests.support.tiny import cpu_device

pytestmark = pytest.mark.gpu


def values_and_gradients(device, dtype, fp32, kept=None):
    generator = torch.Generator().manual_seed(3)
    rows = torch.randn(64, 32, generator=generator).to(device, dtype).requires_grad_()
    weight = torch.randn(1000, 32, generator=generator).to(device, dtype).requires_grad_()
    targets = torch.randint(990, (64,), generator=generator).to(device)
    losses = torch.randn(2, 64, generator=generator).to(device)
    head = VocabHead(weight, 990, dist.group.WORLD, fp32=fp32)
    words = None if kept is None else KeptWords.of(kept(targets.cpu()), torch.device(device))
    found = head_values(rows, head, targets, 0.8, entropy="differentiable", kept=words)
    (losses * torch.stack([found.logprobs, found.entropy])).sum().backward()
    parts = found.logprobs.detach(), found.entropy.detach(), rows.grad, weight.grad
    return [part.double().cpu() for part in parts]


@pytest.mark.parametrize(
    ("dtype", "fp32", "tolerance"),
    [(torch.float32, False, 1e-5), (torch.bfloat16, True, 1e-3), (torch.bfloat16, False, 4e-3)],
)
def test_cuda_computes_what_the_cpu_computes(monkeypatch, dtype, fp32, tolerance):
    cpu_device()
    monkeypatch.setattr(vocab_tiles, "TILE", {"cpu": 64 * 100, "cuda": 64 * 300})
    expected = values_and_gradients("cpu", dtype, fp32)
    found = values_and_gradients("cuda", dtype, fp32)
    for one, other in zip(found, expected):
        assert float((one - other).norm() / other.norm()) < tolerance


def narrow(targets):
    """Sets of the target and about 20 words of the first 400."""
    rng = np.random.default_rng(5)
    sets = [np.unique(np.append(rng.integers(0, 400, 20), int(target))) for target in targets]
    return KeptTokens.of_sizes(np.concatenate(sets), np.array([len(ids) for ids in sets]))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 4e-3)])
def test_over_kept_words_too(monkeypatch, dtype, tolerance):
    cpu_device()
    monkeypatch.setattr(vocab_tiles, "TILE", {"cpu": 64 * 100, "cuda": 64 * 300})
    expected, found = (values_and_gradients(kind, dtype, False, narrow) for kind in ("cpu", "cuda"))
    for one, other in zip(found, expected):
        assert float((one - other).norm() / other.norm()) < tolerance
