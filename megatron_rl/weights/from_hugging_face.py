"""From a Hugging Face directory into the model: each rank reads what it holds. The ranks talk only
of errors.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Callable, Iterable, Sequence

import torch

from megatron_rl.config.hf_config import family_of
from megatron_rl.config.schema import ModelConfig
from megatron_rl.errors import UserError
from megatron_rl.families.common.family import Rule
from megatron_rl.models.parameters import ParameterView, weight_views
from megatron_rl.parallel.collective_try import collective_try
from megatron_rl.parallel.groups import Groups
from megatron_rl.weights.rules import join, rule_of
from megatron_rl.weights.source import HuggingFaceTensors
from megatron_rl.weights.unused import refuse_unused


@torch.no_grad()
def load_hf_weights(
    chunks: Sequence[torch.nn.Module],
    groups: Groups,
    model: ModelConfig,
    directory: Path,
    progress: Callable[[list[Any], int, str], Iterable[Any]] = lambda views, *_: views,
) -> None:
    """Fill this rank's model chunks (bare), in their own dtype. A collective over all ranks.

    An optimizer that exists already may hold its own copy of the weights: call its
    ``reload_model_params`` afterwards. ``progress(weights, count, text)`` may show how far it is.

    Raises:
        UserError: on all ranks: a tensor is missing, has another shape, or is in the directory and
            not in the model; see also `refuse_unused`.
    """
    directory = Path(directory)
    used = collective_try(groups.world, lambda: _fill(chunks, groups, model, directory, progress))

    def look_at_the_rest() -> None:
        if groups.world.rank() == 0:
            family = family_of(directory, model.family)
            source = HuggingFaceTensors(directory, family)
            refuse_unused(source, set().union(*used), model, family)

    collective_try(groups.world, look_at_the_rest)


def _fill(
    chunks: Sequence[torch.nn.Module],
    groups: Groups,
    model: ModelConfig,
    directory: Path,
    progress: Callable[[list[Any], int, str], Iterable[Any]],
) -> set[str]:
    """Fill the chunks; names of the tensors that were used."""
    family = family_of(directory, model.family)
    source = HuggingFaceTensors(directory, family)
    used: set[str] = set()
    views = list(weight_views(chunks, groups))
    for view in progress(views, len(views), "reading"):
        rule = rule_of(view.name, family)
        used.update(rule.parts)
        target = view.of(view.parameter.data)
        target.copy_(_local(view, rule, source, model))
    return used


def _local(
    view: ParameterView, rule: Rule, source: HuggingFaceTensors, model: ModelConfig
) -> torch.Tensor:
    """This rank's slice of a weight."""
    parts = [source.get(name) for name in rule.parts]
    found = sum(part.numel() for part in parts)
    whole = view.global_shape()
    if found != whole.numel() or parts[0].shape[1:] != whole[1:]:
        shapes = ", ".join(f"{name} {tuple(source.shape(name))}" for name in rule.parts)
        raise UserError(
            f"{source.directory} holds {shapes}; expected parts of a weight {tuple(whole)}; "
            "correct its config.json, or the model section of the configuration"
        )
    if view.padding:
        return view.slice_of(parts[0])
    return join(rule, parts, model, view.axis, view.group.rank(), view.group.size())
