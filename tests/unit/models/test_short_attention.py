"""Attention among few keys, where tests of whole placements do not reach."""

import pytest
import torch

from tests.support.tiny import cpu_device

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def megatron():
    cpu_device()


def test_longer_rows_of_keys_are_left_to_the_kernels():
    from megatron_rl.models.attention import packed_placement
    from megatron_rl.models.shared_attention import shared_placement
    from megatron_rl.models.short_attention import LONGEST

    assert packed_placement([LONGEST, 2], LONGEST + 4, CPU).short is not None
    assert packed_placement([LONGEST + 1, 2], LONGEST + 4, CPU).short is None
    assert shared_placement([4, LONGEST - 4], [-1, 0], LONGEST, CPU).short is not None
    assert shared_placement([4, LONGEST - 3], [-1, 0], LONGEST + 1, CPU).short is None


def test_one_placement_serves_other_numbers_of_groups_and_values_of_another_width():
    from megatron_rl.models.shared_attention import shared_placement

    placement = shared_placement([3, 2, 4, 1], [-1, 0, 0, -1], 12, CPU)
    seen = [[0], [0, 1], [0, 1, 2], [0, 1, 2, 3], [0, 1, 2, 3, 4], [0, 1, 2, 5], [0, 1, 2, 5, 6]]
    seen += [[0, 1, 2, 5, 6, 7], [0, 1, 2, 5, 6, 7, 8], [9], [10], [11]]
    for heads, groups in ((4, 2), (3, 3), (4, 1)):
        generator = torch.Generator().manual_seed(heads)
        query, key, value, weights = (
            torch.randn(12, count, width, generator=generator, dtype=torch.float64)
            for count, width in ((heads, 5), (groups, 5), (groups, 3), (heads, 3))
        )
        leaves = [tensor.requires_grad_() for tensor in (query, key, value)]
        rows = [
            torch.softmax(key[seen[t], h * groups // heads] @ query[t, h] * 0.3, 0)
            @ value[seen[t], h * groups // heads]
            for t in range(12)
            for h in range(heads)
        ]
        expected = torch.stack(rows).view(12, heads, 3)
        output = placement.attend(1, *leaves, 0.3)
        torch.testing.assert_close(output, expected, atol=1e-12, rtol=1e-12)
        found = torch.autograd.grad((output * weights).sum(), leaves)
        wanted = torch.autograd.grad((expected * weights).sum(), leaves)
        for ours, theirs in zip(found, wanted, strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=1e-12)
