"""The cache and the placements that use it, against attention over the whole sequence."""

import pytest
import torch

from tests.support.tiny import cpu_device

HEADS, GROUPS, WIDTH, SCALE = 4, 2, 8, 0.3


@pytest.fixture(autouse=True)
def megatron():
    cpu_device()


def slow_attention(query, key, value):
    """The last token's attention over one sequence: [heads, d], [n, groups, d] -> [heads, d]."""
    outputs = []
    for head in range(HEADS):
        group = head // (HEADS // GROUPS)
        weights = torch.softmax(key[:, group] @ query[head] * SCALE, dim=0)
        outputs.append(weights @ value[:, group])
    return torch.stack(outputs)


def random_qkv(num_tokens, generator):
    make = lambda heads: torch.randn(num_tokens, heads, WIDTH, generator=generator)  # noqa: E731
    return make(HEADS), make(GROUPS), make(GROUPS)


@pytest.mark.parametrize("padding", [0, 3])
def test_prefill_then_decode_is_attention_over_the_whole_sequence(padding):
    from megatron_rl.models.attention import packed_placement
    from megatron_rl.rollout.builtin.kv_cache import KVCache, PrefillPlacement, decode_placement

    generator = torch.Generator().manual_seed(0)
    lengths = [3, 70, 5]
    total = sum(lengths)
    query, key, value = random_qkv(total + padding, generator)
    cache = KVCache(3, 6)  # too short: it has to grow
    cache.reserve(70)
    rows = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))
    placement = packed_placement(
        lengths, total + padding, torch.device("cpu"), PrefillPlacement, cache=cache, rows=rows
    )
    placement.attend(9, query, key, value, SCALE)
    keys, values = list(key[:total].split(lengths)), list(value[:total].split(lengths))

    picked = torch.tensor([2, 1, 1, 0])
    cache = cache.select(picked)
    keys, values = [keys[i] for i in picked], [values[i] for i in picked]
    positions = torch.tensor(lengths)[picked]
    for step in range(3):
        query, key, value = random_qkv(4 + padding, generator)
        placement = decode_placement(cache, positions + step, 70 + step, 4 + padding)
        output = placement.attend(9, query, key, value, SCALE)
        for row in range(4):
            keys[row] = torch.cat([keys[row], key[row : row + 1]])
            values[row] = torch.cat([values[row], value[row : row + 1]])
            expected = slow_attention(query[row], keys[row], values[row])
            torch.testing.assert_close(output[row], expected, atol=1e-6, rtol=1e-5)
        assert output.shape == (4 + padding, HEADS, WIDTH)
        assert not output[4:].any()


def test_growing_keeps_what_is_written_and_adds_zeros():
    from megatron_rl.rollout.builtin.kv_cache import BLOCK, KVCache

    cache = KVCache(2, 1)
    rows, positions = torch.tensor([1, 0]), torch.tensor([BLOCK - 1, 0])
    key = torch.arange(1.0, 2 * 1 * 3 + 1).view(2, 1, 3)
    cache.write(4, rows, positions, key, -key)
    cache.reserve(BLOCK)
    assert cache.capacity == BLOCK
    cache.reserve(BLOCK + 1)
    assert cache.keys[4].shape == (2, 1, 2 * BLOCK, 3)
    torch.testing.assert_close(cache.keys[4][1, 0, BLOCK - 1], torch.tensor([1.0, 2.0, 3.0]))
    torch.testing.assert_close(cache.values[4][0, 0, 0], torch.tensor([-4.0, -5.0, -6.0]))
    assert cache.keys[4].sum() == key.sum() and cache.values[4].sum() == -key.sum()


def test_layers_have_caches_of_their_own_and_the_type_of_what_is_written():
    from megatron_rl.rollout.builtin.kv_cache import KVCache

    cache = KVCache(1, 1)
    zero = torch.tensor([0])
    cache.write(3, zero, zero, torch.full((1, 1, 2), 3.0), torch.zeros(1, 1, 2))
    half = torch.full((1, 1, 2), 5.0, dtype=torch.bfloat16)
    cache.write(5, zero, zero, half, half)
    assert cache.keys[3][0, 0, 0].tolist() == [3.0, 3.0]
    assert cache.keys[5].dtype == torch.bfloat16 and cache.keys[5][0, 0, 0, 0] == 5.0
    assert sorted(cache.values) == [3, 5]
