"""Packs are no longer than their number needs."""

import numpy as np
import pytest
import torch
import torch.distributed as dist

from megatron_rl.data.packing import plan_packs
from megatron_rl.policy.pack_length import TRIALS, shortest_length
from megatron_rl.records import Sample
from tests.support.ranks import run_on_ranks
from tests.support.tiny import cpu_device


def samples_of(lengths):
    return [Sample.of(np.arange(n)[:1] % 64, np.arange(n)[1:] % 64, 1.0) for n in lengths]


def shortest(lengths, pack_tokens, multiple, num_packs=None, packed_tokens=None):
    """The length for one mini-batch, and how many packs it had before."""
    cpu_device()
    samples = samples_of(lengths)
    before = num_packs or len(plan_packs(samples, pack_tokens))
    tokens = packed_tokens or sum(lengths)
    length = shortest_length(
        lambda n: len(plan_packs(samples, n)),
        longest=max(lengths),
        least=-(-tokens // before),
        most=pack_tokens,
        multiple=multiple,
        num_packs=before,
        ranks=dist.group.WORLD,
        device=torch.device("cpu"),
    )
    return length, before


def test_by_hand():
    # Two packs of 100 rows held [40, 40] and [40]: 200 rows for 120 tokens.
    assert shortest([40, 40, 40], 100, 4) == (80, 2)
    # Three fit into 44 rows, but not the one of 45.
    assert shortest([45, 40, 40], 60, 4) == (48, 3)
    # The last pack is full as well.
    assert shortest([30, 30, 30, 30], 60, 4) == (60, 2)


def _agreed(lengths_of_rank):
    lengths = lengths_of_rank[dist.get_rank()]
    return shortest(lengths, 100, 4, num_packs=2, packed_tokens=120)[0]


def test_the_rank_with_most_to_do_decides():
    assert run_on_ranks(2, _agreed, [[10, 20], [40, 40, 40]]) == [80, 80]


@pytest.mark.parametrize("seed", range(20))
def test_never_more_packs_never_longer_and_near_the_shortest_of_all(seed):
    draw = np.random.default_rng(seed)
    lengths = draw.integers(1, 200, size=draw.integers(8, 60)).tolist()
    length, before = shortest(lengths, 512, 16)
    plan = plan_packs(samples_of(lengths), length)
    assert len(plan) <= before
    assert length <= 512 and length % 16 == 0
    members = sorted(index for trees in plan for tree in trees for index in tree.members)
    assert members == list(range(len(lengths)))
    # Slow judge: every multiple, one after the other.
    fits = [
        n
        for n in range(16, 513, 16)
        if n >= max(lengths) and len(plan_packs(samples_of(lengths), n)) <= before
    ]
    assert fits[0] <= length <= fits[0] + 16 * -(-32 // TRIALS)
