"""What a rank does not depend on how many there are."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist

from megatron_rl.catalogue import kinds
from megatron_rl.catalogue.find import find
from megatron_rl.config.schema import Config
from megatron_rl.records import Completion, Prompt, RolloutGroup
from megatron_rl.rewards.base import Reward
from megatron_rl.rollout.collect import ScoredGroup
from tests.support.ranks import run_on_ranks
from tests.support.tiny import cpu_device

REWARDS = [[0.0, 1.0, 1.0], [0.1, 0.1, 0.1], [1.0, 0.0, 0.0], [0.3, 0.9, 0.6]]


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("mini_batches", [1, 3])
def test_every_mini_batch_is_the_same_slice_of_the_batch_for_any_number_of_ranks(
    ranks, mini_batches
):
    cpu_device()
    from megatron_rl.tasks.reinforce import my_share

    config = Config(algorithm={"mini_batches": mini_batches})
    batch = list(range(24))
    size = 24 // mini_batches
    joined = [[] for _ in range(mini_batches)]
    for rank in range(ranks):
        group = SimpleNamespace(rank=lambda r=rank: r, size=lambda: ranks)
        mine = my_share(batch, config, SimpleNamespace(data=group))
        assert len(mine) == 24 // ranks
        for m in range(mini_batches):
            joined[m] += mine[m * size // ranks : (m + 1) * size // ranks]
    assert joined == [batch[m * size : (m + 1) * size] for m in range(mini_batches)]


def scored_group(index, rewards):
    completion = Completion(np.array([1]), np.zeros(1, dtype=np.float32), True, "x")
    group = RolloutGroup(Prompt(index, np.array([1]), "p", {}), (completion,) * len(rewards))
    return ScoredGroup(group, tuple(Reward(value, {}, "") for value in rewards))


def _advantages(name):
    from megatron_rl.tasks.reinforce import global_advantages

    config = Config(algorithm={"advantages": name})
    share = len(REWARDS) // dist.get_world_size()
    first = dist.get_rank() * share
    groups = [scored_group(i, REWARDS[i]) for i in range(first, first + share)]
    parallel = SimpleNamespace(data=dist.group.WORLD)
    return global_advantages(groups, config, parallel)


@pytest.mark.parametrize("name", ["group_norm", "reinforce_pp"])
def test_advantages_are_normalised_over_the_groups_of_all_ranks(name):
    estimate = find(kinds.ADVANTAGES, name).load()
    expected = estimate(torch.tensor(REWARDS))
    parts = run_on_ranks(2, _advantages, name)
    torch.testing.assert_close(torch.cat(parts), expected)
    if name == "reinforce_pp":  # one rank's groups alone would give others
        assert not torch.allclose(parts[0], estimate(torch.tensor(REWARDS[:2])))
