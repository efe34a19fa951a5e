"""Attention over shared prompts against every sequence by itself."""

import pytest
import torch
import torch.distributed as dist

from megatron_rl.parallel.sequence_shards import padded_spans, sequence_shards
from tests.support.ranks import run_on_ranks
from tests.support.tiny import cpu_device

#: Two prompts, of which the first has three answers and the second two, and two whole sequences.
LENGTHS = [7, 3, 9, 1, 6, 5, 2, 6, 4]
PARENTS = [-1, 0, 0, 0, -1, -1, 5, 5, -1]
HEADS, GROUPS, WIDTH, SCALE = 4, 2, 8, 0.3
CPU = torch.device("cpu")


def inputs(num_rows):
    generator = torch.Generator().manual_seed(5)
    shapes = [(num_rows, heads, WIDTH) for heads in (HEADS, GROUPS, GROUPS, HEADS)]
    return [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]


def rows_of_segments(multiple):
    rows, start = [], 0
    for length in LENGTHS:
        rows.append(torch.arange(start, start + length))
        start += -(-length // multiple) * multiple
    return rows


def one_by_one(multiple, num_rows):
    """Output and gradients, a query and a head at a time."""
    query, key, value, weights = inputs(num_rows)
    leaves = [tensor.requires_grad_() for tensor in (query, key, value)]
    segments = rows_of_segments(multiple)
    output, total = torch.zeros_like(query), 0.0
    for rows, parent in zip(segments, PARENTS):
        front = segments[parent] if parent >= 0 else rows[:0]
        for n, row in enumerate(rows.tolist()):
            seen = torch.cat([front, rows[: n + 1]])
            for head in range(HEADS):
                group = head // (HEADS // GROUPS)
                scores = SCALE * key[seen, group] @ query[row, head]
                result = scores.softmax(0) @ value[seen, group]
                output[row, head] = result.detach()
                total = total + (result * weights[row, head]).sum()
    total.backward()
    return output, [leaf.grad for leaf in leaves]


@pytest.mark.parametrize("longest", [0, 64])  #: of what is short: torch's kernels, or products
def test_answers_see_their_prompt_and_themselves(longest, monkeypatch):
    cpu_device()
    from megatron_rl.models import shared_attention
    from megatron_rl.models.shared_attention import shared_placement

    monkeypatch.setattr(shared_attention, "LONGEST", longest)
    num_rows = 48
    placement = shared_placement(LENGTHS, PARENTS, num_rows, CPU)
    assert (placement.short is None) == (longest == 0)
    *tensors, weights = inputs(num_rows)
    leaves = [tensor.requires_grad_() for tensor in tensors]
    output = placement.attend(1, *leaves, SCALE)
    (output * weights * ~placement.padding[:, None, None]).sum().backward()
    expected, gradients = one_by_one(1, num_rows)
    real = ~placement.padding
    assert real.tolist() == [True] * sum(LENGTHS) + [False] * 5
    torch.testing.assert_close(output[real].detach(), expected[real], atol=1e-12, rtol=1e-12)
    for leaf, gradient in zip(leaves, gradients):
        torch.testing.assert_close(leaf.grad[real], gradient[real], atol=1e-12, rtol=1e-12)
    assert placement.positions.tolist() == [
        *range(7), *range(7, 10), *range(7, 16), 7, *range(6), *range(5), 5, 6, *range(5, 11),
        *range(4), *[0] * 5,
    ]  # fmt: skip
    with pytest.raises(ValueError, match="segments of 43 tokens do not fit a row of 42"):
        shared_placement(LENGTHS, PARENTS, 42, CPU)


def attend(multiple, num_rows):
    """On a rank: its rows of the output and of the gradients."""
    cpu_device()
    from megatron_rl.models.context_attention import context_placement

    spans = padded_spans(LENGTHS, num_rows, multiple)
    shards = sequence_shards(spans, dist.group.WORLD, CPU)
    placement = context_placement(LENGTHS, spans, shards, CPU, PARENTS)
    *tensors, weights = inputs(num_rows)
    # Padding holds large numbers: nobody may look at it.
    segments = torch.zeros(num_rows, dtype=torch.bool)
    segments[torch.cat(rows_of_segments(multiple))] = True
    tensors = [torch.where(segments[:, None, None], tensor, 50.0) for tensor in tensors]
    leaves = [shards.local(tensor).clone().requires_grad_() for tensor in tensors]
    output = placement.attend(1, *leaves, SCALE)
    (output * shards.local(weights) * ~placement.padding[:, None, None]).sum().backward()
    return shards.rows, placement.positions, output.detach(), [leaf.grad for leaf in leaves]


@pytest.mark.parametrize("size", [2, 4])
def test_context_parallel_ranks_see_the_same(size):
    multiple, num_rows = 2 * size, 128
    expected, gradients = one_by_one(multiple, num_rows)
    found = run_on_ranks(size, attend, multiple, num_rows)
    rows = torch.cat([part[0] for part in found])
    segments = rows_of_segments(multiple)
    real = torch.cat(segments)
    back = rows.argsort()[real]
    output = torch.cat([part[2] for part in found])[back]
    torch.testing.assert_close(output, expected[real], atol=1e-12, rtol=1e-12)
    for number, gradient in enumerate(gradients):
        whole = torch.cat([part[3][number] for part in found])[back]
        torch.testing.assert_close(whole, gradient[real], atol=1e-12, rtol=1e-12)
    positions = torch.cat([part[1] for part in found])[back].split(LENGTHS)
    for position, length, parent in zip(positions, LENGTHS, PARENTS):
        first = LENGTHS[parent] if parent >= 0 else 0
        assert position.tolist() == list(range(first, first + length))


def test_gradients_of_rows_that_are_read_several_times():
    cpu_device()
    from megatron_rl.models.shared_attention import row_reads

    entries = torch.tensor([2, 0, 2, 1, 2, 0])
    valid = torch.tensor([True, True, True, False, True, True])
    reads = row_reads(entries, valid, CPU)
    rows = torch.arange(4.0)[:, None].requires_grad_()
    found = reads.read(rows)
    assert found.squeeze(1).tolist() == [2, 0, 2, 1, 2, 0]
    found.backward(torch.tensor([[1.0], [10], [100], [1000], [10000], [100000]]))
    assert rows.grad.squeeze(1).tolist() == [100010, 0, 10101, 0]
