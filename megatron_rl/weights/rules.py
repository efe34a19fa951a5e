"""Weights of the model and the Hugging Face tensors they are made of, by the rules of a family.

Weights have the package's own names (`families.common.names`); a family's rule gives the names of
their parts in a Hugging Face checkpoint, and how they are joined.
"""

from __future__ import annotations

from typing import Sequence

import torch

from megatron_rl.config.layout import heads_of
from megatron_rl.config.schema import ModelConfig
from megatron_rl.errors import UserError
from megatron_rl.families.common.family import Family, Rule
from megatron_rl.families.common.names import expert_of, layer_of


def rule_of(name: str, family: Family) -> Rule:
    """The rule of a weight, with the full names of its parts.

    Raises:
        UserError: the family has no such weight.
    """
    if name in family.weights:
        return Rule(family.weights[name].join, family.weights[name].parts)
    layer, within = layer_of(name) or (None, "")
    expert, within = expert_of(within)
    rule = family.layer_weights.get(within)
    if rule is None:
        raise UserError(
            f"the model's weight {name} has no counterpart in Hugging Face's {family.model_type}; "
            "expected a model that the family describes; see megatron_rl/families/README.md"
        )
    assert layer is not None, "a rule of a layer"
    begin, number = family.layer_name.format(layer=layer), "" if expert is None else expert
    return Rule(rule.join, tuple(begin + part.format(expert=number) for part in rule.parts))


def join(
    rule: Rule,
    parts: Sequence[torch.Tensor],
    model: ModelConfig,
    axis: int | None = None,
    rank: int = 0,
    size: int = 1,
) -> torch.Tensor:
    """A weight, or a slice of it, from its parts: only the part of each part that it needs.

    Args:
        rule: of the weight. parts: whole tensors, in the rule's order; they may be mapped files.
        axis: the axis of the weight that tensor parallelism splits; None: the whole weight.
        rank: which of ``size`` slices.
    """
    if axis is None:
        size, rank, axis = 1, 0, 0
    if rule.join == "copy":
        return parts[0].chunk(size, axis)[rank]
    if rule.join == "gate_up":
        return torch.cat([part.chunk(size, axis)[rank] for part in parts])
    _, groups, _ = heads_of(model)
    mine = [_by_group(part, groups).chunk(size)[rank] for part in parts]
    return torch.cat(mine, dim=1).flatten(0, 1)


def split(rule: Rule, weight: torch.Tensor, model: ModelConfig) -> list[torch.Tensor]:
    """The parts of a whole weight, contiguous: the inverse of `join`."""
    if rule.join == "copy":
        return [weight.contiguous()]
    if rule.join == "gate_up":
        return [half.contiguous() for half in weight.chunk(2)]
    _, groups, width = heads_of(model)
    grouped = _by_group(weight, groups)
    queries = grouped.shape[1] - 2 * width
    return [part.flatten(0, 1) for part in grouped.split([queries, width, width], dim=1)]


def alone(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor; a copy if it is a part of another, which it would keep in memory."""
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def _by_group(part: torch.Tensor, groups: int) -> torch.Tensor:
    """[groups * n, ...] -> [groups, n, ...]."""
    return part.view(groups, len(part) // groups, *part.shape[1:])
