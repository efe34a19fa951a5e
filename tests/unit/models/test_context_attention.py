"""Attention over context-parallel ranks against softmax attention written out for every token."""

import pytest
import torch
import torch.distributed as dist

from megatron_rl.parallel.sequence_shards import padded_spans, sequence_shards, zigzag_rows
from tests.support.ranks import run_on_ranks

LENGTHS = [13, 2, 16, 7, 1, 25]
NUM_TOKENS = 96
HEADS, GROUPS, WIDTH = 4, 2, 8
SCALE = 0.3


def inputs(dtype=torch.float64):
    """Queries, keys, values and the weights of the output, of the whole row."""
    generator = torch.Generator().manual_seed(5)
    shapes = [(NUM_TOKENS, heads, WIDTH) for heads in (HEADS, GROUPS, GROUPS, HEADS)]
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes]


def attend(multiple, spoilt, dtype):
    """On a rank: its rows of the attention's output and of the gradients.

    ``spoilt``: padding is large numbers, and the outputs there count for nothing.
    """
    from megatron_rl.models.context_attention import context_placement

    spans = padded_spans(LENGTHS, NUM_TOKENS, multiple)
    shards = sequence_shards(spans, dist.group.WORLD, torch.device("cpu"))
    placement = context_placement(LENGTHS, spans, shards, torch.device("cpu"))
    *tensors, weights = inputs(dtype)
    if spoilt:
        tensors = [torch.where(_padding(multiple)[:, None, None], 50.0, t) for t in tensors]
    leaves = [shards.local(tensor).clone().requires_grad_() for tensor in tensors]
    output = placement.attend(1, *leaves, SCALE)
    local_weights = shards.local(weights) * ~placement.padding[:, None, None]
    (output * local_weights).sum().backward()
    return {
        "output": output.detach(),
        "gradients": [leaf.grad for leaf in leaves],
        "positions": placement.positions.tolist(),
        "padding": placement.padding.tolist(),
        "work": sum(mask.numel() for bucket in placement.buckets for mask in bucket.masks),
    }


def _starts(multiple):
    starts, start = [], 0
    for length in LENGTHS:
        starts.append(start)
        start += -(-length // multiple) * multiple
    return starts


def _padding(multiple):
    padding = torch.ones(NUM_TOKENS, dtype=torch.bool)
    for start, length in zip(_starts(multiple), LENGTHS):
        padding[start : start + length] = False
    return padding


def written_out(multiple):
    """Output and gradients on the whole row, one token and head at a time."""
    query, key, value, weights = inputs()
    leaves = [tensor.requires_grad_() for tensor in (query, key, value)]
    output = torch.zeros_like(query)
    total = torch.zeros((), dtype=torch.float64)
    for start, length in zip(_starts(multiple), LENGTHS):
        for position in range(length):
            seen = slice(start, start + position + 1)
            for head in range(HEADS):
                group = head // (HEADS // GROUPS)
                scores = SCALE * key[seen, group] @ query[start + position, head]
                result = scores.softmax(0) @ value[seen, group]
                output[start + position, head] = result.detach()
                total = total + (result * weights[start + position, head]).sum()
    total.backward()
    return output, [leaf.grad for leaf in leaves]


@pytest.mark.parametrize("spoilt", [False, True], ids=["", "spoilt padding"])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_values_and_gradients(size, spoilt):
    multiple = 2 * size
    output, gradients = written_out(multiple)
    padding = _padding(multiple)
    spans = padded_spans(LENGTHS, NUM_TOKENS, multiple)
    for rank, result in enumerate(run_on_ranks(size, attend, multiple, spoilt, torch.float64)):
        rows = zigzag_rows(spans, rank, size)
        real = ~padding[rows]
        assert result["padding"] == padding[rows].tolist()
        torch.testing.assert_close(result["output"][real], output[rows][real])
        for found, expected in zip(result["gradients"], gradients, strict=True):
            torch.testing.assert_close(found, expected[rows])


def test_positions_are_those_in_the_sequence():
    results = run_on_ranks(2, attend, 4, False, torch.float64)
    # 13 tokens in 16 rows, chunks of 4; 2 in 4, chunks of 1
    assert results[0]["positions"][:10] == [0, 1, 2, 3, 12, 13, 14, 15, 0, 3]
    assert results[1]["positions"][:10] == [4, 5, 6, 7, 8, 9, 10, 11, 1, 2]
    assert results[0]["padding"][:10] == [*[False] * 5, *[True] * 3, False, True]


def test_every_rank_has_the_same_work():
    work = [result["work"] for result in run_on_ranks(4, attend, 8, False, torch.float64)]
    assert len(set(work)) == 1 and work[0] > 0


def test_bf16_is_close():
    output, gradients = written_out(4)
    spans = padded_spans(LENGTHS, NUM_TOKENS, 4)
    for rank, result in enumerate(run_on_ranks(2, attend, 4, False, torch.bfloat16)):
        rows = zigzag_rows(spans, rank, 2)
        real = ~_padding(4)[rows]
        close = {"atol": 0.06, "rtol": 0.03}
        assert result["output"].dtype == torch.bfloat16
        torch.testing.assert_close(result["output"][real].double(), output[rows][real], **close)
        for found, expected in zip(result["gradients"], gradients, strict=True):
            torch.testing.assert_close(found.double(), expected[rows], **close)
