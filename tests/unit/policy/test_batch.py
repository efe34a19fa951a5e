"""Every rank gets equally many packs of equal length."""

import numpy as np
import pytest
import torch
import torch.distributed as dist

from megatron_rl.records import Sample
from tests.support.ranks import run_on_ranks
from tests.support.tiny import cpu_device, tiny_config


def sample(length, advantage=1.0):
    """A sequence that takes this many rows: its last token is a target only."""
    tokens, logprobs = np.arange(length + 1) % 64, np.full(length, -0.5, dtype=np.float32)
    return Sample.of(tokens[:1], tokens[1:], advantage, logprobs)


def _packed(parallel, lengths_of_rank, data, mini_batches=1):
    """On a rank: for each mini-batch the (length, sequence lengths) of its packs."""
    cpu_device()
    import torch.distributed as dist
    from megatron.core import parallel_state

    from megatron_rl.parallel.groups import build_groups, destroy_groups
    from megatron_rl.policy.batch import pack_mini_batches

    if parallel_state.model_parallel_is_initialized():
        destroy_groups()
    config = tiny_config(parallel=parallel, data={**data, "share_prompts": "off"})
    groups = build_groups(config.parallel)
    samples = [sample(length) for length in lengths_of_rank[dist.get_rank()]]
    size = -(-len(samples) // mini_batches)
    slices = [samples[m * size : (m + 1) * size] for m in range(mini_batches)]
    packed = pack_mini_batches(slices, config, groups, torch.device("cpu"))
    destroy_groups()
    return [
        [
            (len(pack.tokens), torch.bincount(pack.sequence_ids)[: pack.num_sequences].tolist())
            for pack in packs
        ]
        for packs in packed
    ]


def test_packs_are_as_long_as_the_largest_mini_batch_of_any_rank_needs():
    data = {"pack_tokens": 64, "pack_multiple": 8}
    # Rank 1's second mini-batch holds 20 tokens: 24, rounded up to the multiple.
    lengths = [[5, 6, 3, 2], [4, 4, 11, 9]]
    assert run_on_ranks(2, _packed, {}, lengths, data, 2) == [
        [[(24, [5, 6])], [(24, [3, 2])]],
        [[(24, [4, 4])], [(24, [11, 9])]],
    ]


def test_ranks_with_less_to_do_get_empty_packs():
    data = {"pack_tokens": 16, "pack_multiple": 8}
    lengths = [[5, 6], [16, 9, 9, 7]]
    assert run_on_ranks(2, _packed, {}, lengths, data) == [
        [[(16, [5, 6]), (16, []), (16, [])]],
        [[(16, [16]), (16, [9, 7]), (16, [9])]],
    ]


@pytest.mark.parametrize("parallel", [{"tensor": 2}, {"pipeline": 2}])
def test_no_pack_is_longer_than_configured_under_any_layout(parallel):
    data = {"pack_tokens": 24, "pack_multiple": 8}
    expected = [[(24, [20]), (24, [5, 13]), (24, [12])]]
    lengths = [[20, 12, 5, 13]] * 2
    found = run_on_ranks(2, _packed, parallel, lengths, data)
    assert found == [expected, expected]


def test_the_interleaved_schedule_gets_a_multiple_of_its_stages():
    data = {"pack_tokens": 24, "pack_multiple": 8}
    parallel = {"pipeline": 2, "virtual_pipeline": 2}
    expected = [[(24, [20]), (24, [5, 13]), (24, [12]), (24, [])]]
    found = run_on_ranks(2, _packed, parallel, [[20, 12, 5, 13]] * 2, data)
    assert found == [expected, expected]


def test_tensors_hold_what_the_pack_holds():
    cpu_device()
    from megatron_rl.data.packing import pack_samples
    from megatron_rl.policy.batch import to_device

    (pack,) = pack_samples([sample(3, 0.5), sample(2, -2.0)], 8, vocab_size=64)
    tensors = to_device(pack, torch.device("cpu"), dist.group.WORLD, dist.group.WORLD)
    assert tensors.tokens.tolist()[:5] == [0, 1, 2, 0, 1]
    assert tensors.mask.tolist() == [True] * 5 + [False] * 3
    assert tensors.advantages.tolist()[:5] == [0.5, 0.5, 0.5, -2.0, -2.0]
    assert tensors.sequence_ids.tolist() == [0, 0, 0, 1, 1, 2, 2, 2]
    assert tensors.placement.positions.tolist()[:5] == [0, 1, 2, 0, 1]
    assert tensors.placement.padding.tolist() == [False] * 5 + [True] * 3
