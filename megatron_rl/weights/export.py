"""From the model to Hugging Face: whole tensors one after the other, a directory of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Iterable, Iterator, Sequence

import torch
import torch.distributed as dist

from megatron_rl.config.hf_config import family_of, model_type_of
from megatron_rl.config.hf_export import check_describes, describing_family
from megatron_rl.config.schema import ModelConfig
from megatron_rl.families.common.family import Family
from megatron_rl.models.parameters import ParameterView, weight_views
from megatron_rl.parallel.collectives import all_max, gather_objects
from megatron_rl.parallel.groups import Groups
from megatron_rl.weights.rules import rule_of, split
from megatron_rl.weights.writer import SHARD_BYTES, write_hf_directory


@torch.no_grad()
def stream_weights(
    chunks: Sequence[torch.nn.Module], groups: Groups, model: ModelConfig, family: Family
) -> Iterator[tuple[str, torch.Tensor]]:
    """The model's weights as (Hugging Face name, whole tensor), in the model's dtype and device.

    Every tensor of the model comes out on exactly one rank: of the ranks that hold copies the
    first, and of those that hold slices the first, which the others send theirs. Beside the model a
    rank needs room for one weight. To be consumed to the end by all ranks: tensor-parallel ranks
    gather in step.
    """
    for view in weight_views(chunks, groups):
        yield from _whole(view, model, family)


#: Weights of a rank that are on the way to rank 0 at a time.
ROUND = 32


@torch.no_grad()
def gather_weights(
    chunks: Sequence[torch.nn.Module], groups: Groups, model: ModelConfig, family: Family
) -> Iterator[tuple[str, torch.Tensor]]:
    """What `stream_weights` yields on all ranks, on rank 0 of the world; nothing on the others,
    which have to consume it as well.

    The ranks of a pipeline stage have as many weights, in the same order, so those that gather a
    weight together are in the same round.
    """
    world, views = groups.world, list(weight_views(chunks, groups))
    device = next(chunks[0].parameters()).device
    rounds = -(-all_max(len(views), world, device) // ROUND)
    for number in range(rounds):
        mine: list[tuple[str, torch.Tensor]] = []
        for view in views[number * ROUND : (number + 1) * ROUND]:
            mine += _whole(view, model, family)
        described = gather_objects([(name, t.shape, t.dtype) for name, t in mine], world)
        if world.rank() > 0:
            for _, tensor in mine:
                dist.send(tensor, dst=0, group=world)
            continue
        yield from mine
        for rank, entries in enumerate(described[1:], start=1):
            for name, shape, dtype in entries:
                tensor = torch.empty(shape, dtype=dtype, device=device)
                dist.recv(tensor, src=rank, group=world)
                yield name, tensor


def _whole(
    view: ParameterView, model: ModelConfig, family: Family
) -> Iterable[tuple[str, torch.Tensor]]:
    """The parts of a weight, on the rank that is to give them. A collective over its group."""
    if view.tied or view.replicas.rank() > 0:
        return []
    whole = view.gather(view.of(view.parameter.detach()))
    if view.group.rank() > 0:
        return []
    rule = rule_of(view.name, family)
    return zip(rule.parts, split(rule, whole, model), strict=True)


def describe(model: ModelConfig, like: Path | None) -> tuple[Family, dict[str, Any]]:
    """The family of the exported model and its config.json: those of ``like``, which must describe
    the model, or what is made for it, where there is none.
    """
    if like is None or not (like / "config.json").is_file():
        return describing_family(model)
    check_describes(like, model)
    # the rest is copied from there
    return family_of(like, model.family), {"model_type": model_type_of(like)}


def export_model(
    chunks: Sequence[torch.nn.Module],
    groups: Groups,
    model: ModelConfig,
    directory: Path,
    *,
    like: Path | None = None,
    shard_bytes: int = SHARD_BYTES,
    replace: bool = False,
) -> None:
    """Write the model as a Hugging Face directory that transformers and vLLM load. A collective.

    Args:
        chunks: this rank's model chunks, bare.
        groups: process groups.
        model: the architecture.
        directory: the target; see `write_hf_directory`, as for the other arguments.
        like: the model directory training started from.

    Raises:
        UserError: no family describes the model, or the target exists. OSError: writing failed.
    """
    family, config = describe(model, like)
    write_hf_directory(
        Path(directory),
        stream_weights(chunks, groups, model, family),
        config,
        groups.world,
        like=like,
        shard_bytes=shard_bytes,
        replace=replace,
    )
