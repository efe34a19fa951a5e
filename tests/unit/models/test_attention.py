"""Packed attention is attention over one sequence at a time."""

import pytest
import torch

from tests.support.tiny import build_tiny, cpu_device, tiny_config

CPU = torch.device("cpu")
HEADS, GROUPS, WIDTH, SCALE = 6, 2, 4, 0.4
#: Lengths that make one bucket, several, sequences of one token, and a row of padding only.
ROWS = [([5], 0), ([1, 9, 3, 1, 8, 8], 0), ([2, 17, 6], 4), ([1], 3), ([], 5)]


@pytest.fixture(autouse=True)
def megatron():
    cpu_device()


def slow_attention(query, key, value):
    """Token by token, head by head: [n, heads, d], [n, groups, d] -> [n, heads, d]."""
    rows = []
    for t in range(len(query)):
        for head in range(HEADS):
            group = head // (HEADS // GROUPS)
            weights = torch.softmax(key[: t + 1, group] @ query[t, head] * SCALE, dim=0)
            rows.append(weights @ value[: t + 1, group])
    return torch.stack(rows).view(len(query), HEADS, WIDTH)


@pytest.mark.parametrize("longest", [0, 64])  #: of what is short: torch's kernels, or products
@pytest.mark.parametrize(("lengths", "padding"), ROWS)
def test_values_and_gradients_are_those_of_one_sequence_at_a_time(
    lengths, padding, longest, monkeypatch
):
    from megatron_rl.models import attention
    from megatron_rl.models.attention import packed_placement

    monkeypatch.setattr(attention, "LONGEST", longest)
    total = sum(lengths)
    generator = torch.Generator().manual_seed(total)
    shapes = [(total + padding, heads, WIDTH) for heads in (HEADS, GROUPS, GROUPS)]
    inputs = [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]
    weights = torch.randn(shapes[0], generator=generator)
    weights[total:] = 0.0  # nothing is asked of padding
    output = packed_placement(lengths, total + padding, CPU).attend(1, *inputs, SCALE)
    (output * weights).sum().backward()

    wide = [tensor.detach().double().requires_grad_() for tensor in inputs]
    pieces = zip(*(tensor[:total].split(lengths) for tensor in wide)) if lengths else ()
    for piece, place, weight in zip(
        pieces, output[:total].detach().split(lengths), weights[:total].split(lengths)
    ):
        expected = slow_attention(*piece)
        torch.testing.assert_close(place.double(), expected.detach(), atol=2e-6, rtol=2e-6)
        (expected * weight).sum().backward()
    for tensor, reference in zip(inputs, wide):
        expected = torch.zeros_like(reference) if reference.grad is None else reference.grad
        torch.testing.assert_close(tensor.grad.double(), expected, atol=5e-6, rtol=5e-6)


def test_a_layout_says_where_tokens_and_padding_are():
    from megatron_rl.models.attention import packed_placement

    placement = packed_placement([3, 1, 2], 8, CPU)
    assert placement.positions.tolist() == [0, 1, 2, 0, 0, 1, 0, 0]
    assert placement.padding.tolist() == [False] * 6 + [True] * 2
    assert placement.cumulative_lengths.tolist() == [0, 3, 4, 6, 8]
    assert placement.longest == 3
    with pytest.raises(ValueError, match="sequences of 6 tokens do not fit a row of 5"):
        packed_placement([3, 1, 2], 5, CPU)


def test_buckets_hold_sequences_of_similar_length():
    from megatron_rl.models.attention import packed_placement

    # 10 and 7 (>= 0.67 * 10), then 6 and 5 (6.7 > 6), then 2, then 1 (< 1.34).
    placement = packed_placement([5, 10, 1, 7, 2, 6], 31, CPU)
    assert placement.bucket_shapes == ((2, 10), (2, 6), (1, 2), (1, 1))


def run_model(chunk, tokens, lengths, num_tokens):
    from megatron_rl.models.attention import packed_placement
    from megatron_rl.models.forward import forward_row

    return forward_row(chunk, tokens, packed_placement(lengths, num_tokens, CPU)).squeeze(0)


def test_a_packed_model_is_the_model_on_each_sequence():
    """Logits, and gradients of all weights, through attention, rotary embedding and experts."""
    _, _, (chunk,) = build_tiny(tiny_config(model={"moe_layer_freq": [0, 1]}))
    generator = torch.Generator().manual_seed(1)
    lengths, padding = [7, 1, 12, 3], 5
    total = sum(lengths)
    tokens = torch.randint(64, (total + padding,), generator=generator)
    weights = torch.randn(total, 64, generator=generator)

    packed = run_model(chunk, tokens, lengths, total + padding)[:total]
    (packed * weights).sum().backward()
    gradients = {name: p.grad.clone() for name, p in chunk.named_parameters()}
    chunk.zero_grad(set_to_none=True)
    singles = [
        run_model(chunk, part, [len(part)], len(part)) for part in tokens[:total].split(lengths)
    ]
    singles = torch.cat(singles)
    (singles * weights).sum().backward()

    torch.testing.assert_close(packed, singles, atol=2e-5, rtol=1e-5)
    for name, parameter in chunk.named_parameters():
        error = (gradients[name] - parameter.grad).norm() / parameter.grad.norm()
        assert error < 1e-5, (name, error)


def test_what_stands_in_the_padding_changes_nothing():
    _, _, (chunk,) = build_tiny(tiny_config())
    lengths, total, room = [4, 9], 13, 20
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(64, (room,), generator=generator)
    results = []
    for filler in (0, 63):
        tokens[total:] = filler
        chunk.zero_grad(set_to_none=True)
        logits = run_model(chunk, tokens, lengths, room)[:total]
        logits.logsumexp(-1).sum().backward()
        gradients = [p.grad.clone() for p in chunk.parameters()]
        results.append((logits.detach(), gradients))
    torch.testing.assert_close(results[0][0], results[1][0], atol=1e-5, rtol=1e-5)
    for first, second in zip(results[0][1], results[1][1]):
        torch.testing.assert_close(first, second, atol=2e-5, rtol=1e-4)


def test_rotary_angles_are_megatrons_at_the_positions():
    from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding

    from megatron_rl.models.attention import PositionalRotaryEmbedding

    options = dict(kv_channels=8, rotary_percent=1.0, rotary_base=5e5, use_cpu_initialization=True)
    ours, theirs = PositionalRotaryEmbedding(**options), RotaryEmbedding(**options)
    plain = theirs(20)
    assert torch.equal(ours(torch.arange(20)), plain)
    picked = torch.tensor([0, 1, 2, 0, 1, 19, 5])
    assert torch.equal(ours(picked), plain[picked])


def test_bf16_attention_on_the_cpu_is_rounded_once():
    from megatron_rl.models.attention import packed_placement

    generator = torch.Generator().manual_seed(3)
    query = torch.randn(9, HEADS, WIDTH, generator=generator).bfloat16()
    key, value = (torch.randn(9, GROUPS, WIDTH, generator=generator).bfloat16() for _ in range(2))
    placement = packed_placement([9], 9, CPU)
    output = placement.attend(1, query, key, value, SCALE)
    exact = placement.attend(1, query.float(), key.float(), value.float(), SCALE)
    assert torch.equal(output, exact.bfloat16())
