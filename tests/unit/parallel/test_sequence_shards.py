"""Which rows of a pack each rank holds, and the way back."""

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from megatron_rl.parallel.collectives import gather_first_dim, gather_objects
from megatron_rl.parallel.sequence_shards import (
    padded_spans,
    sequence_multiple,
    sequence_shards,
    tensor_slice,
    zigzag_rows,
)
from tests.support.ranks import run_on_ranks
from tests.support.tiny import cpu_device

CPU = torch.device("cpu")


def test_zigzag_by_hand():
    # Two sequences of 8 and 4 tokens, chunks of 2 and 1: 01 23 45 67 | 8 9 10 11
    assert zigzag_rows([8, 4], 0, 2).tolist() == [0, 1, 6, 7, 8, 11]
    assert zigzag_rows([8, 4], 1, 2).tolist() == [2, 3, 4, 5, 9, 10]
    assert zigzag_rows([2, 4], 0, 1).tolist() == [0, 1, 2, 3, 4, 5]
    assert zigzag_rows([12], 2, 3).tolist() == [4, 5, 6, 7]
    assert zigzag_rows([], 0, 2).tolist() == []


def chunk_by_chunk(spans, rank, size):
    rows, start = [], 0
    for span in spans:
        chunk = span // (2 * size)
        for number in (rank, 2 * size - 1 - rank):
            rows += range(start + number * chunk, start + (number + 1) * chunk)
        start += span
    return rows


@given(st.lists(st.integers(0, 5), max_size=6), st.integers(1, 4))
def test_zigzag_is_chunk_by_chunk_and_a_partition(chunks, size):
    spans = [2 * size * chunk for chunk in chunks]
    every = [zigzag_rows(spans, rank, size).tolist() for rank in range(size)]
    assert every == [chunk_by_chunk(spans, rank, size) for rank in range(size)]
    assert sorted(row for rows in every for row in rows) == list(range(sum(spans)))


def test_spans_by_hand():
    assert [sequence_multiple(size) for size in (1, 2, 4)] == [1, 4, 8]
    assert padded_spans([5, 4, 1], 24, 4) == [8, 4, 4, 4, 4]
    assert padded_spans([5, 3], 8, 1) == [5, 3]
    assert padded_spans([], 8, 4) == [4, 4]


def test_what_cannot_be_cut_is_refused():
    with pytest.raises(ValueError, match="12 tokens, padded to multiples of 4, in a row of 10"):
        padded_spans([5, 3], 10, 4)
    with pytest.raises(ValueError, match="in a row of 14"):
        padded_spans([5, 3], 14, 4)
    with pytest.raises(ValueError, match=r"\[8, 6\] tokens cannot be cut into 4 chunks"):
        zigzag_rows([8, 6], 0, 2)


def test_over_one_rank_everything_is_the_identity():
    cpu_device()
    shards = sequence_shards([4, 2], dist.group.WORLD, CPU)
    value = torch.arange(6.0)
    assert shards.local(value) is value and shards.whole(value) is value
    assert tensor_slice(value, dist.group.WORLD).tolist() == value.tolist()


def spread(spans):
    """On a rank: a row cut and put together, and the gradient of a function of the whole."""
    world = dist.group.WORLD
    shards = sequence_shards(spans, world, CPU)
    row = torch.stack([torch.arange(sum(spans)) * 1.0, torch.arange(sum(spans)) * -10.0], dim=1)
    local = shards.local(row).requires_grad_()
    whole = shards.whole(local)
    weights = torch.arange(len(row)) + 1.0
    (whole[:, 0] * weights).sum().backward()
    return {
        "local": local.detach(),
        "whole": whole.detach(),
        "gradient": local.grad,
        "slice": tensor_slice(row[:, 0], world),
    }


@pytest.mark.parametrize("size", [2, 4])
def test_a_row_is_cut_and_put_together(size):
    spans = [4 * size, 2 * size, 6 * size]
    for rank, result in enumerate(run_on_ranks(size, spread, spans)):
        rows = chunk_by_chunk(spans, rank, size)
        assert result["local"][:, 0].tolist() == rows
        assert result["whole"][:, 0].tolist() == list(range(12 * size))
        assert result["whole"][:, 1].tolist() == [-10.0 * row for row in range(12 * size)]
        # Each token's gradient is on the rank that holds it, once.
        assert result["gradient"][:, 0].tolist() == [row + 1.0 for row in rows]
        assert not result["gradient"][:, 1].any()
        assert result["slice"].tolist() == list(range(12 * rank, 12 * rank + 12))


def gather_summed():
    """On a rank: the gradient where every rank weights the gathered tensor its own way."""
    rank, world = dist.get_rank(), dist.group.WORLD
    results = {}
    for dtype in (torch.float32, torch.bfloat16):
        part = torch.full((2, 3), float(rank), dtype=dtype, requires_grad=True)
        whole = gather_first_dim(part, world, sum_gradients=True)
        weights = torch.arange(12.0, dtype=dtype).view(4, 3).T.contiguous().T  # no plain strides
        (whole * weights * (rank + 1)).sum().backward()
        results[dtype] = (whole[:, 0].tolist(), part.grad.tolist())
    return results, gather_objects({"rank": rank}, world)


def test_gather_with_gradients_summed_over_ranks():
    for rank, (results, objects) in enumerate(run_on_ranks(2, gather_summed)):
        expected = (3 * torch.arange(12.0)).view(2, 2, 3)[rank]
        for whole, gradient in results.values():
            assert whole == [0.0, 0.0, 1.0, 1.0]
            assert gradient == expected.tolist()
        assert objects == [{"rank": 0}, {"rank": 1}]
