"""The process groups of a run: built once, frozen, passed explicitly."""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist
from megatron.core import parallel_state
from torch.distributed import ProcessGroup

from megatron_rl.config.schema import ParallelConfig


@dataclass(frozen=True)
class Groups:
    """Every group that this rank is in, groups of one rank included."""

    world: ProcessGroup
    tensor: ProcessGroup
    pipeline: ProcessGroup
    context: ProcessGroup
    data: ProcessGroup  #: ranks with other data, same shard of the dense weights
    data_context: ProcessGroup  #: data x context: ranks over which dense gradients are summed
    tensor_context: ProcessGroup
    model: ProcessGroup  #: tensor x pipeline: ranks that hold one replica of the dense weights
    expert: ProcessGroup
    expert_tensor: ProcessGroup
    experts: ProcessGroup  #: expert x expert tensor: ranks that together hold each expert once
    expert_data: ProcessGroup  #: ranks that hold the same expert shard
    pipeline_stages: int
    virtual_stages: int | None

    @property
    def is_first_stage(self) -> bool:
        """True where the embedding of the first model chunk lives."""
        return self.pipeline.rank() == 0

    @property
    def is_last_stage(self) -> bool:
        """True where the output layer of the last model chunk, and so the loss, lives."""
        return self.pipeline.rank() == self.pipeline.size() - 1


def build_groups(config: ParallelConfig) -> Groups:
    """Make Megatron's groups, in the same order on every rank; torch.distributed must be
    initialised.
    """
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=config.tensor,
        pipeline_model_parallel_size=config.pipeline,
        virtual_pipeline_model_parallel_size=config.virtual_pipeline,
        context_parallel_size=config.context,
        expert_model_parallel_size=config.expert,
        expert_tensor_parallel_size=config.expert_tensor,
    )
    world = dist.group.WORLD
    assert world is not None, "torch.distributed is initialised"
    return Groups(
        world=world,
        tensor=parallel_state.get_tensor_model_parallel_group(),
        pipeline=parallel_state.get_pipeline_model_parallel_group(),
        context=parallel_state.get_context_parallel_group(),
        data=parallel_state.get_data_parallel_group(),
        data_context=parallel_state.get_data_parallel_group(with_context_parallel=True),
        tensor_context=parallel_state.get_tensor_and_context_parallel_group(),
        model=parallel_state.get_model_parallel_group(),
        expert=parallel_state.get_expert_model_parallel_group(),
        expert_tensor=parallel_state.get_expert_tensor_parallel_group(),
        experts=parallel_state.get_expert_tensor_and_model_parallel_group(),
        expert_data=parallel_state.get_expert_data_parallel_group(),
        pipeline_stages=config.pipeline,
        virtual_stages=config.virtual_pipeline,
    )


def destroy_groups() -> None:
    """Destroy Megatron's groups and their communicators, so that this process can build others."""
    made = parallel_state._global_process_group_list or []
    parallel_state.destroy_model_parallel()
    for group in made:
        # A rank outside a group has None or a number in its place.
        if isinstance(group, ProcessGroup) and group in dist.distributed_c10d._world.pg_map:
            dist.destroy_process_group(group)
