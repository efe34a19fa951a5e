"""An optimizer's state as shards of the model's own tensors, for Megatron's plain or distributed
optimizer.

Every parameter has tensors of its own shape, stored under the parameter's key: of Adam ``exp_avg``
and ``exp_avg_sq``, of another optimizer what it keeps (``optimizers/state.py``), and where the
model is not fp32 the fp32 main weight ``param``. So the state can be read at another layout, with
another number of chained optimizers, and by the distributed optimizer or without it. The number of
updates is one integer, the same for all parameters. Learning rate, betas and weight decay are not
stored: they come from the configuration.

The ``state_dict``, ``sharded_state_dict`` and ``load_state_dict`` of Megatron's optimizers are not
used. With torch's Adam (no Transformer Engine, no Apex; Megatron 0.16.1 and 0.19.2) the distributed
optimizer

* asserts in ``state_dict`` before its first step, when Adam has no state: `_prime` makes it;
* fails with KeyError 'step' in ``_set_main_param_and_optimizer_states``, which expects a stored
  tensor for everything Adam keeps: `_restore_distributed` takes ``step`` out meanwhile;
* gives all parameters ONE ``step`` tensor in ``load_state_dict``, which Adam then advances once per
  parameter (a wrong bias correction, without an error): `_set_step` gives each its own;

and both kinds refuse a state with another number of chained optimizers (expert parallelism on or
off). This module can go when all four are mended.
"""

from __future__ import annotations

from typing import Any, Iterator, TypeAlias

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.optimizer import make_sharded_optimizer_tensor
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import MegatronOptimizer
from torch.distributed import ProcessGroup

from megatron_rl.optimizers import state as any_state
from megatron_rl.optimizers.members import main_parameters, members
from megatron_rl.parallel.collective_try import collective_try

PREFIX = "optimizer.state"
MOMENTS = ("exp_avg", "exp_avg_sq")
Shard: TypeAlias = ShardedTensor | ShardedTensorFactory


def optimizer_shards(
    optimizer: MegatronOptimizer, model_shards: dict[str, Any], loading: bool
) -> dict[str, dict[str, dict[str, Shard]]]:
    """The optimizer's state as shards, to be written or (``loading``) read into.

    Args:
        optimizer: what ``get_megatron_optimizer`` made, or has been put in its place.
        model_shards: ``sharded_state_dict`` of all the model chunks; its tensors are the parameters
            themselves.
        loading: the shards need not hold the state's values. When False, and with the distributed
            optimizer, this is a collective: it gathers the state of the data-parallel ranks.

    Returns:
        chained optimizer -> parameter (both counted, as text) -> kind of tensor -> shard.
    """
    by_parameter = {
        id(shard.data): shard
        for shard in nested_values(model_shards)
        if isinstance(shard, (ShardedTensor, ShardedTensorFactory))
    }
    shards = {}
    for number, member in enumerate(members(optimizer)):
        _prime(member.optimizer)
        if isinstance(member, DistributedOptimizer):
            shards[str(number)] = _distributed_shards(member, model_shards, loading)
        else:
            shards[str(number)] = _plain_shards(member, by_parameter)
    return shards


@torch.no_grad()
def restore_optimizer(
    optimizer: MegatronOptimizer, loaded: dict[str, dict[str, dict[str, torch.Tensor]]], step: int
) -> None:
    """Put back what was read for `optimizer_shards`; restore the model's weights before.

    Args:
        optimizer: the optimizer the shards were made from.
        loaded: the tensors in the structure of the shards.
        step: updates made so far.
    """
    for number, member in enumerate(members(optimizer)):
        state = loaded.get(str(number), {})
        if isinstance(member, DistributedOptimizer):
            _restore_distributed(member, state)
        else:
            _restore_plain(member, state)
        _set_step(member.optimizer, step)


def optimizer_step(optimizer: MegatronOptimizer, world: ProcessGroup) -> int:
    """Updates made so far; a collective, because a rank may hold no part of the state."""
    steps = [any_state.step_of(member.optimizer) for member in members(optimizer)]
    return max(collective_try(world, lambda: max(steps, default=0)))


def _prime(adam: torch.optim.Optimizer) -> None:
    """Give Adam the state that it makes in its first step, all zero, where it has none yet."""
    if any_state.was_replaced(adam):
        any_state.prime(adam)
        return
    for group in adam.param_groups:
        for parameter in group["params"]:
            state = adam.state[parameter]
            if "exp_avg" not in state:
                state |= {
                    name: torch.zeros_like(parameter, dtype=torch.float32) for name in MOMENTS
                }
                _set_parameter_step(adam, group, parameter, 0)


def _set_step(adam: torch.optim.Optimizer, step: int) -> None:
    """Set the number of updates made so far, wherever this Adam keeps it."""
    if any_state.was_replaced(adam):
        any_state.set_step(adam, step)
        return
    for group in adam.param_groups:
        if not _counts_per_parameter(adam):
            group["step"] = step
        for parameter in group["params"]:
            _set_parameter_step(adam, group, parameter, step)


def _counts_per_parameter(adam: torch.optim.Optimizer) -> bool:
    """torch's Adam counts in a tensor per parameter; Transformer Engine's and Apex's per group."""
    return isinstance(adam, (torch.optim.Adam, torch.optim.AdamW))


def _set_parameter_step(
    adam: torch.optim.Optimizer, group: dict[str, Any], parameter: torch.Tensor, step: int
) -> None:
    if _counts_per_parameter(adam):
        device = parameter.device if group["capturable"] or group["fused"] else "cpu"
        count = torch.tensor(float(step), dtype=torch.float32, device=device)
        adam.state[parameter]["step"] = count


def _plain_tensors(
    member: MegatronOptimizer,
) -> Iterator[tuple[torch.Tensor, dict[str, torch.Tensor]]]:
    """(parameter of the model, its tensors of state)."""
    for parameter, main in main_parameters(member):
        if any_state.was_replaced(member.optimizer):
            tensors = any_state.state_tensors(member.optimizer, main)
        else:
            tensors = {name: member.optimizer.state[main][name] for name in MOMENTS}
        if main is not parameter:
            tensors[any_state.MAIN_WEIGHT] = main
        yield parameter, tensors


def _plain_shards(
    member: MegatronOptimizer, by_parameter: dict[int, Shard]
) -> dict[str, dict[str, Shard]]:
    return {
        str(index): {
            name: make_sharded_optimizer_tensor(
                by_parameter[id(parameter)], tensor.detach(), f"{PREFIX}.{name}"
            )
            for name, tensor in tensors.items()
        }
        for index, (parameter, tensors) in enumerate(_plain_tensors(member))
    }


def _restore_plain(member: MegatronOptimizer, loaded: dict[str, dict[str, torch.Tensor]]) -> None:
    for index, (_, tensors) in enumerate(_plain_tensors(member)):
        for name, tensor in tensors.items():
            stored = loaded[str(index)][name]
            assert stored.shape == tensor.shape, (name, stored.shape, tensor.shape)
            tensor.copy_(stored)  # onto itself where Megatron has read into the shard given


def _distributed_parameters(member: DistributedOptimizer) -> list[torch.nn.Parameter]:
    """The model's parameters in the order in which Megatron numbers them in this format."""
    return [parameter for buffer in member.buffers for parameter in buffer.param_index_map]


def _distributed_shards(
    member: DistributedOptimizer, model_shards: dict[str, Any], loading: bool
) -> dict[str, dict[str, Shard]]:
    shards = member.sharded_param_state_fully_reshardable(model_shards, loading, metadata={})
    named = {}
    for index, parameter in enumerate(_distributed_parameters(member)):
        named[str(index)] = dict(shards[index])
        if parameter.dtype == torch.float32:  # the main weight is the weight itself
            del named[str(index)]["param"]
    return named


def _restore_distributed(
    member: DistributedOptimizer, loaded: dict[str, dict[str, torch.Tensor]]
) -> None:
    state = {}
    for index, parameter in enumerate(_distributed_parameters(member)):
        state[index] = dict(loaded[str(index)])
        state[index].setdefault("param", parameter.detach())
    for tensors in member.optimizer.state.values():
        tensors.pop("step", None)
    member.load_parameter_state_from_fully_reshardable(state)
