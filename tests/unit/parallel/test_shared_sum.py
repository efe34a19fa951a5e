import os
import socket

import pytest
import torch
import torch.distributed as dist

from megatron_rl.parallel import shared_memory
from megatron_rl.parallel.shared_memory import SharedMemory, share_memory
from megatron_rl.parallel.shared_sum import add_up
from tests.support.ranks import run_on_ranks

SIZES = ((1, 2000, 4097, 5), (3, 3000), (6001,), (1024, 1024))


def _numbers(rank, sizes):
    generator = torch.Generator().manual_seed(rank)
    return [torch.randn(size, generator=generator) for size in sizes]


def _sums():
    """On a rank: sums of tensors of several sizes, in memory of a page a slot."""
    memory = share_memory(dist.group.WORLD, 4000, timeout_s=60.0)
    found = []
    for sizes in SIZES:  # one after the other: no rank may write what another has still to read
        tensors = _numbers(dist.get_rank(), sizes)
        add_up(tensors, memory)
        found.append(tensors)
    return found, len(memory.slots[0])


@pytest.mark.parametrize("ranks", [2, 3])
def test_sums_are_those_of_all_ranks_bit_by_bit_alike(ranks):
    results = run_on_ranks(ranks, _sums)
    for found, room in results:
        assert room == 1024  # so each sum is one of several parts
        for sizes, tensors, first in zip(SIZES, found, results[0][0], strict=True):
            expected = [sum(terms) for terms in zip(*(_numbers(r, sizes) for r in range(ranks)))]
            torch.testing.assert_close(tensors, expected, rtol=1e-6, atol=1e-6)
            assert all(torch.equal(a, b) for a, b in zip(tensors, first, strict=True))


def _without_memory(names):
    """On a rank: what it gets where the ranks' directories differ or have no room."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shared_memory, "DIRECTORY", names[dist.get_rank()])
        return share_memory(dist.group.WORLD, 4000, timeout_s=60.0)


def test_ranks_that_share_no_memory_all_get_none(tmp_path):
    there, missing = tmp_path, tmp_path / "missing"
    assert run_on_ranks(2, _without_memory, (missing, there)) == [None, None]
    assert run_on_ranks(2, _without_memory, (there, missing)) == [None, None]
    assert os.listdir(tmp_path) == []


def _alone(timeout_s):
    """The first of two ranks, and the other's end of its connection."""
    mine, other = socket.socketpair()
    mine.settimeout(timeout_s)
    memory = object.__new__(SharedMemory)
    memory.others, memory._peers = (1,), {1: mine}
    return memory, other


def test_a_rank_that_is_gone_or_silent_is_an_error_in_the_words_of_gloo():
    memory, other = _alone(0.05)
    with pytest.raises(RuntimeError, match="Timed out waiting for rank 1"):
        memory.meet()
    other.close()
    with pytest.raises(RuntimeError, match="Connection (closed|reset) by peer|Broken pipe"):
        memory.meet()
