import dataclasses

import torch.distributed as dist

from megatron_rl.config.schema import ParallelConfig
from tests.support.ranks import run_on_ranks


def _members(parallel):
    """On a rank: the global ranks of each of its groups."""
    from megatron.core import parallel_state

    from megatron_rl.parallel.groups import build_groups, destroy_groups

    if parallel_state.model_parallel_is_initialized():
        destroy_groups()
    groups = build_groups(ParallelConfig(**parallel))
    members = {
        field.name: dist.get_process_group_ranks(getattr(groups, field.name))
        for field in dataclasses.fields(groups)
        if isinstance(getattr(groups, field.name), dist.ProcessGroup)
    }
    members["stages"] = (groups.is_first_stage, groups.is_last_stage)
    destroy_groups()
    members["destroyed"] = not parallel_state.model_parallel_is_initialized()
    return members


def test_tensor_is_the_fastest_axis_and_pipeline_the_slowest():
    results = run_on_ranks(4, _members, {"tensor": 2, "pipeline": 2})
    for rank, found in enumerate(results):
        assert found["tensor"] == [[0, 1], [0, 1], [2, 3], [2, 3]][rank]
        assert found["pipeline"] == [[0, 2], [1, 3]][rank % 2]
        assert found["data"] == found["expert"] == [rank]
        assert found["model"] == found["world"] == [0, 1, 2, 3]
        # Experts are whole on both tensor-parallel ranks: copies of each other.
        assert found["expert_data"] == found["tensor"]
        assert found["stages"] == (rank < 2, rank >= 2)
        assert found["destroyed"]


def test_expert_groups_lie_in_the_data_parallel_ranks():
    results = run_on_ranks(4, _members, {"expert": 2})
    for rank, found in enumerate(results):
        assert found["data"] == found["data_context"] == [0, 1, 2, 3]
        assert found["expert"] == [[0, 1], [0, 1], [2, 3], [2, 3]][rank]
        assert found["expert_data"] == [[0, 2], [1, 3]][rank % 2]
        assert found["tensor"] == found["pipeline"] == [rank]
