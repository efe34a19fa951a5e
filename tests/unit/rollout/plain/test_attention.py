"""Attention over the cache of fixed strides."""

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
    cache = Cache([widths], 3, 8, x)
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
            cache.grow(16)
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
    cache = Cache([(2, 4, 4), (2, 4, 4)], 6, 9, torch.empty(0, dtype=dtype))
    for store in (*cache.keys, *cache.values):
        store.copy_(make(*store.shape))  # what stands behind a row's end does not count
    positions = torch.tensor([6, 4, 2, 1, 0])
    none = (torch.empty(0), torch.empty(0))
    place = Decoding(cache, positions, none, [(slice(0, 2), 8), (slice(2, 5), 3)], 0)
    query, key, value = make(5, 2, 3, 4), make(5, 2, 4), make(5, 2, 4)
    place.store(1, key, value)
    output = place.attend(1, query, key, value, 0.3)
    for row, end in enumerate((positions + 1).tolist()):
        assert torch.equal(cache.keys[1][row, :, end - 1], key[row])
        for group in range(2):
            for head in range(3):
                scores = cache.keys[1][row, group, :end] @ query[row, group, head] * 0.3
                expected = scores.softmax(0) @ cache.values[1][row, group, :end]
                torch.testing.assert_close(output[row, group, head], expected, rtol=0, atol=1e-6)


def test_rotation_by_hand():
    from megatron_rl.rollout.builtin.plain.attention import rotated

    cos, sin = torch.tensor([0.6, 1.0, 0.6, 1.0]), torch.tensor([-0.8, 0.0, 0.8, 0.0])
    x = torch.tensor([[1.0, 2.0, 10.0, 20.0]])
    # (1, 10) is turned by the angle of cosine 0.6 and sine 0.8, (2, 20) by none
    torch.testing.assert_close(rotated(x, cos, sin), torch.tensor([[-7.4, 2.0, 6.8, 20.0]]))


def test_rows_that_move_take_all_layers_along():
    from megatron_rl.rollout.builtin.plain.cache import Cache

    cache = Cache([(2, 3, 4), (1, 5, 0)], 3, 2, torch.empty(0))
    for store in (*cache.keys, *cache.values):
        store.copy_(torch.arange(3.0).view(3, 1, 1, 1).expand_as(store))
    cache.move(torch.tensor([2]), torch.tensor([0]))
    for store in (*cache.keys, *cache.values):
        assert [row.unique().tolist() for row in store if row.numel()] in (
            [[2.0], [1.0], [2.0]],
            [],
        )
