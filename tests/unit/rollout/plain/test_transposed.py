"""Weights laid out for products of few rows."""

import torch

from tests.support.tiny import cpu_device


def made(dtype=torch.float32):
    from megatron_rl.rollout.builtin.plain.weights import (
        ChunkWeights,
        GroupedAttention,
        Layer,
        Mixture,
    )

    generator = torch.Generator().manual_seed(0)
    make = lambda *shape: torch.randn(*shape, generator=generator).to(dtype)  # noqa: E731
    attention = GroupedAttention(make(192, 128), make(192), make(16), make(16), make(128, 96))
    mixture = Mixture(make(160, 128), None, make(3, 160, 128), make(3, 128, 80), 0, None, None)
    layer = Layer(1, make(128), attention, make(128), mixture)
    words = make(200, 128)
    return ChunkWeights(words, (layer,), make(128), words)


def tensors(chunk):
    found = {}
    from megatron_rl.rollout.builtin.plain.weights import mapped

    mapped(chunk, lambda name, weight: found.setdefault(f"{name} {len(found)}", weight))
    return found


def test_large_matrices_are_turned_in_memory_and_stay_what_they_are():
    cpu_device()
    from megatron_rl.rollout.builtin.plain.transposed import transposed

    chunk = made()
    before, after = tensors(chunk), tensors(transposed(chunk))
    turned = []
    for (name, old), new in zip(before.items(), after.values(), strict=True):
        assert torch.equal(old, new)
        if old.data_ptr() != new.data_ptr():
            assert new.mT.is_contiguous()
            turned.append(name.split()[0])
    # The second factor of a product, of 16,384 elements or more: not the embedding, nor the
    # router, nor expert matrices of 128 x 80, nor the output projection of 128 x 96.
    assert turned == ["qkv", "up", "head"]


def test_copies_are_not_made_of_larger_models_nor_of_other_types(monkeypatch):
    cpu_device()
    from megatron_rl.rollout.builtin.plain import transposed as module
    from megatron_rl.rollout.builtin.plain.transposed import transposed

    chunk = made()
    size = 4 * (192 * 128 + 3 * 160 * 128 + 200 * 128)
    monkeypatch.setattr(module, "MOST_BYTES", size - 1)
    assert transposed(chunk) is chunk
    monkeypatch.setattr(module, "MOST_BYTES", size)
    assert transposed(chunk) is not chunk
    half = made(torch.bfloat16)
    pairs = zip(tensors(half).values(), tensors(transposed(half)).values())
    assert all(old is new for old, new in pairs)
