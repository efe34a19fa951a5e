"""Replaces the Adam that Megatron has made by another torch optimizer.

Megatron's wrapper stays: fp32 main weights, clipping, the learning rate of each group.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Sequence

import torch

from megatron_rl.catalogue.blame import blame
from megatron_rl.catalogue.entry import OptimizerEntry
from megatron_rl.catalogue.settings import Settings
from megatron_rl.config.layout import heads_of
from megatron_rl.config.schema import ModelConfig
from megatron_rl.models.parameters import ParameterView, parameter_views
from megatron_rl.optimizers.matrices import matrices_of
from megatron_rl.optimizers.members import main_parameters, members
from megatron_rl.optimizers.state import MATRICES
from megatron_rl.parallel.groups import Groups

if TYPE_CHECKING:
    from megatron.core.optimizer import MegatronOptimizer


def replace_optimizer(
    optimizer: MegatronOptimizer,
    row: OptimizerEntry,
    settings: Settings | None,
    chunks: Sequence[torch.nn.Module],
    groups: Groups,
    model: ModelConfig,
) -> None:
    """Let the row's optimizer step the parameters, in the same groups as Adam.

    Args:
        optimizer: of ``get_megatron_optimizer``, not distributed; it has not stepped yet.
        row: the optimizer, not Megatron's own.
        settings: of it.
        chunks: this rank's model chunks, bare.
        groups: the process groups.
        model: the architecture.
    """
    heads, query_groups, width = heads_of(model)
    qkv = (heads // query_groups * width, width, width)
    views: dict[int, list[ParameterView]] = {}
    for view in parameter_views(chunks, groups):
        views.setdefault(id(view.parameter), []).append(view)
    for member in members(optimizer):
        matrices = {
            id(main): matrices_of(views[id(parameter)], qkv)
            for parameter, main in main_parameters(member)
        }
        own = set(member.optimizer.defaults) - {"lr", "weight_decay"}
        given: list[dict[str, Any]] = [
            {
                **{name: value for name, value in group.items() if name not in own},
                MATRICES: [matrices[id(main)] for main in group["params"]],
            }
            for group in member.optimizer.param_groups
        ]
        with blame(f"the optimizer {row.name!r}", "correct it"):
            member.optimizer = row.bind(settings)(given)
