"""Attention over the cache, and how its rows are laid out."""

import numpy as np
import pytest
import torch

from tests.support.tiny import cpu_device

RANK, PLAIN, TURNED, VALUE, HEADS, HIDDEN = 12, 6, 4, 5, 3, 16


@pytest.fixture(autouse=True)
def megatron():
    cpu_device()


def latent_weights(generator):
    from megatron_rl.rollout.builtin.plain.weights import LatentAttention

    make = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    return LatentAttention(
        query_down=None,
        query_norm=None,
        query=make(HEADS * (PLAIN + TURNED), HIDDEN),
        latent_down=make(RANK + TURNED, HIDDEN),
        latent_norm=make(RANK),
        latent_up=make(HEADS * (PLAIN + VALUE), RANK),
        out=make(HIDDEN, HEADS * VALUE),
    )


def slow_latent(x, weights, scale, epsilon):
    """The last token's output of a whole sequence [n, D], head by head."""

    def turned(vector, position):
        pairs = torch.view_as_complex(vector.view(-1, 2).contiguous())
        angles = position / 100.0 ** (torch.arange(TURNED // 2) / (TURNED // 2))
        both = pairs * torch.polar(torch.ones(TURNED // 2), angles.float()).to(pairs.dtype)
        return torch.cat([both.real, both.imag])

    n, outputs = len(x), []
    down = x @ weights.latent_down.T
    latents = down[:, :RANK] / (down[:, :RANK].square().mean(-1, keepdim=True) + epsilon).sqrt()
    latents = latents * weights.latent_norm
    for head in range(HEADS):
        query = (x[-1] @ weights.query.T).view(HEADS, -1)[head]
        up = weights.latent_up.view(HEADS, -1, RANK)[head]
        query = torch.cat([query[:PLAIN], turned(query[PLAIN:], n - 1)])
        keys = [torch.cat([up[:PLAIN] @ latents[t], turned(down[t, RANK:], t)]) for t in range(n)]
        shares = torch.softmax(torch.stack(keys) @ query * scale, 0)
        outputs.append(shares @ torch.stack([up[PLAIN:] @ latents[t] for t in range(n)]))
    return weights.out @ torch.cat(outputs)


@pytest.mark.parametrize("absorbed", [True, False])
def test_latent_attention_with_and_without_compressed_cache(absorbed):
    from megatron_rl.models.attention import packed_placement
    from megatron_rl.rollout.builtin.plain.attention import Heads, cached, latent
    from megatron_rl.rollout.builtin.plain.cache import Cache, Decoding, Prefill

    generator = torch.Generator().manual_seed(0)
    weights = latent_weights(generator)
    group = torch.distributed.group.WORLD
    heads = Heads(PLAIN + TURNED, TURNED, VALUE, RANK, absorbed, 0.3, 1e-6, group)
    widths = cached(weights, heads)
    assert widths == ((1, RANK + TURNED, 0) if absorbed else (HEADS, PLAIN + TURNED, VALUE))
    lengths, rows = [4, 2], [0, 0, 1]  # the first prompt has two answers
    half = 1 / 100.0 ** (torch.arange(TURNED // 2) / (TURNED // 2))
    angles = torch.arange(16)[:, None].double() * half.repeat(2)
    cos, sin = angles.cos(), angles.sin()
    sin[:, : TURNED // 2] *= -1
    at = lambda positions: (cos[positions][:, None], sin[positions][:, None])  # noqa: E731
    x = torch.randn(6, HIDDEN, generator=generator, dtype=torch.float64)
    cache = Cache([widths], [(slice(0, 2), 8), (slice(2, 3), 7)], x)
    placement = packed_placement(lengths, 6, x.device)
    sources = torch.tensor([[0, 1, 2, 3], [0, 1, 2, 3], [4, 5, 5, 5]])
    place = Prefill(cache, placement, at(placement.positions), slice(0, 3), sources)
    output = latent(x, weights, place, 0, heads)
    sequences = [x[:4], x[:4], x[4:]]
    for end, sequence in ((3, sequences[0]), (5, sequences[2])):
        expected = slow_latent(sequence, weights, 0.3, 1e-6)
        torch.testing.assert_close(output[end], expected, rtol=1e-6, atol=1e-6)
    for step in range(5):  # past the cache's first size
        if step == 4:
            cache.lay_out([(slice(0, 2), 16), (slice(2, 3), 7)])
        new = torch.randn(3, HIDDEN, generator=generator, dtype=torch.float64)
        positions = torch.tensor([lengths[row] + step for row in rows])
        parts = [(slice(0, 2), 5 + step), (slice(2, 3), 3 + step)]
        decoding = Decoding(cache, positions, at(positions), parts, RANK)
        output = latent(new, weights, decoding, 0, heads)
        for row in range(3):
            sequences[row] = torch.cat([sequences[row], new[row : row + 1]])
            expected = slow_latent(sequences[row], weights, 0.3, 1e-6)
            torch.testing.assert_close(output[row], expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_new_tokens_attend_to_their_rows(dtype):
    """Two key/value groups of three heads, rows of different lengths in parts: head by head."""
    from megatron_rl.rollout.builtin.plain.cache import Cache, Decoding

    generator = torch.Generator().manual_seed(3)
    make = lambda *shape: torch.randn(*shape, generator=generator, dtype=dtype)  # noqa: E731
    parts = [(slice(0, 2), 9), (slice(2, 5), 4)]
    cache = Cache([(2, 4, 4), (2, 4, 4)], parts, torch.empty(0, dtype=dtype))
    for part in tensors_of(cache):
        part.copy_(make(*part.shape))  # what stands behind a row's end does not count
    positions = torch.tensor([6, 4, 2, 1, 0])
    none = (torch.empty(0), torch.empty(0))
    place = Decoding(cache, positions, none, [(slice(0, 2), 8), (slice(2, 5), 3)], 0)
    query, key, value = make(5, 2, 3, 4), make(5, 2, 4), make(5, 2, 4)
    place.store(1, key, value)
    output = place.attend(1, query, key, value, 0.3)
    keys, values = (
        [row for part in stores[1] for row in part] for stores in (cache.keys, cache.values)
    )
    for row, end in enumerate((positions + 1).tolist()):
        assert torch.equal(keys[row][:, end - 1], key[row])
        for group in range(2):
            for head in range(3):
                scores = keys[row][group, :end] @ query[row, group, head] * 0.3
                expected = scores.softmax(0) @ values[row][group, :end]
                torch.testing.assert_close(output[row, group, head], expected, rtol=0, atol=1e-6)


def test_rotation_by_hand():
    from megatron_rl.rollout.builtin.plain.attention import rotated

    cos, sin = torch.tensor([0.6, 1.0, 0.6, 1.0]), torch.tensor([-0.8, 0.0, 0.8, 0.0])
    x = torch.tensor([[1.0, 2.0, 10.0, 20.0]])
    # (1, 10) is turned by the angle of cosine 0.6 and sine 0.8, (2, 20) by none
    torch.testing.assert_close(rotated(x, cos, sin), torch.tensor([[-7.4, 2.0, 6.8, 20.0]]))


def tensors_of(cache):
    return [part for stores in (cache.keys, cache.values) for layer in stores for part in layer]


def test_rows_that_are_laid_out_anew_keep_what_is_written_of_them():
    """In all layers; behind it there are zeros, since not-a-numbers would count times zero."""
    from megatron_rl.rollout.builtin.plain.cache import Cache

    nan = torch.full((), float("nan"))
    widths = [(2, 3, 4), (1, 5, 0)]
    cache = Cache(widths, [(slice(0, 2), 4), (slice(2, 5), 2)], torch.empty(0))
    for stores in (cache.keys, cache.values):
        for layer in stores:
            for part, first in zip(layer, (0.0, 2.0)):
                rows = torch.arange(first, first + len(part)).view(-1, 1, 1, 1)
                part.copy_(rows + torch.arange(part.shape[2]).view(1, 1, -1, 1) / 10)
    torch.empty(10_000).copy_(nan)  # what new tensors might find
    cache.lay_out([(slice(0, 3), 3), (slice(3, 4), 5)], np.array([4, 1, 2, 0]))
    expected = [
        [[4.0, 4.1, 0.0], [1.0, 1.1, 1.2], [2.0, 2.1, 0.0]],
        [[0.0, 0.1, 0.2, 0.3, 0.0]],
    ]
    assert cache.parts == [(slice(0, 3), 3), (slice(3, 4), 5)]
    for stores, columns in ((cache.keys, 1), (cache.values, 2)):
        for layer, (groups, *of_kind) in zip(stores, widths):
            for part, rows in zip(layer, expected):
                wanted = torch.tensor(rows)[:, None, :, None].expand(-1, groups, -1, -1)
                wanted = wanted.expand(-1, -1, -1, of_kind[columns - 1])
                torch.testing.assert_close(part, wanted, rtol=0, atol=0)


def test_parts_that_stay_as_they_are_are_not_copied():
    from megatron_rl.rollout.builtin.plain.cache import Cache

    cache = Cache([(2, 3, 4)], [(slice(0, 2), 8), (slice(2, 5), 8)], torch.empty(0))
    before = tensors_of(cache)
    assert cache.holds([(slice(0, 2), 8), (slice(2, 5), 3)])
    assert not cache.holds([(slice(0, 2), 8), (slice(2, 5), 9)])
    assert not cache.holds([(slice(0, 3), 8), (slice(3, 5), 8)])
    cache.lay_out([(slice(0, 2), 8), (slice(2, 5), 16)])
    after = tensors_of(cache)
    assert [one is other for one, other in zip(before, after)] == [True, False, True, False]
    assert [part.shape[2] for part in after] == [8, 16, 8, 16]


def test_prompts_fill_rows_of_several_parts():
    """Rows 1 to 3 of two parts; of the second, whose prompts are shorter, only what it has room
    for.
    """
    from megatron_rl.models.attention import packed_placement
    from megatron_rl.rollout.builtin.plain.cache import Cache, Prefill

    cache = Cache([(1, 1, 1)], [(slice(0, 2), 4), (slice(2, 4), 2)], torch.empty(0))
    placement = packed_placement([3, 1], 4, torch.device("cpu"))
    none = (torch.empty(0), torch.empty(0))
    sources = torch.tensor([[0, 1, 2], [3, 3, 3], [3, 3, 3]])
    place = Prefill(cache, placement, none, slice(1, 4), sources)
    place.store(0, torch.tensor([5.0, 6.0, 7.0, 8.0]).view(4, 1, 1), torch.ones(4, 1, 1))
    first, second = cache.keys[0]
    assert first.flatten(1).tolist() == [[0, 0, 0, 0], [5, 6, 7, 0]]
    assert second.flatten(1).tolist() == [[8, 8], [8, 8]]
