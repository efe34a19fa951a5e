"""Every weight under one name that does not depend on how the model is split.

A `ParameterView` is one matrix (or vector) of the whole model as this rank holds it: experts
stacked in one parameter are one view each, layers have their global number. Initial weights,
comparisons between layouts and conversions are written against these names.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any, Iterator, Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed import ProcessGroup

from megatron_rl.families.common.names import EXPERT_BIAS, OF_THE_VOCABULARY
from megatron_rl.models.gpt.chunk import Chunk
from megatron_rl.models.gpt.names import name_in_model
from megatron_rl.parallel.groups import Groups


@dataclass(frozen=True)
class ParameterView:
    """One weight of the whole model, or this rank's slice of it."""

    #: of `families.common.names`: decoder.layers.3.mlp.experts.5.linear_fc1.weight
    name: str
    parameter: torch.Tensor  #: a parameter, or a persistent buffer (expert bias)
    expert: int | None  #: index into the parameter's first axis, where experts are stacked
    axis: (
        int | None
    )  #: axis of the view that is split over ``group``; None: every rank has it whole
    gated: bool  #: the axis holds gate and up, each split on its own
    group: ProcessGroup
    replicas: ProcessGroup  #: ranks that hold the same slice for other data
    #: rows of zeros that the slices of all ranks hold beyond the whole weight's (vocabulary)
    padding: int = 0
    tied: bool = False  #: a copy of the embedding that serves as output layer on the last stage

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """This view of a tensor shaped like the parameter (its data, its gradient, its moments)."""
        return tensor if self.expert is None else tensor[self.expert]

    def global_shape(self) -> torch.Size:
        """Shape of the whole weight."""
        shape = list(self.of(self.parameter).shape)
        if self.axis is not None:
            shape[self.axis] *= self.group.size()
        shape[0] -= self.padding
        return torch.Size(shape)

    def slice_of(self, whole: torch.Tensor) -> torch.Tensor:
        """This rank's slice of the whole weight."""
        if self.padding:
            whole = F.pad(whole, (0, 0, 0, self.padding))
        if self.axis is None:
            return whole
        rank, size = self.group.rank(), self.group.size()
        if self.gated:
            halves = whole.chunk(2, self.axis)
            return torch.cat([half.chunk(size, self.axis)[rank] for half in halves], self.axis)
        return whole.chunk(size, self.axis)[rank]

    def gather(self, local: torch.Tensor) -> torch.Tensor:
        """The whole weight from every rank's slice. A collective over ``group``."""
        if self.axis is None or self.group.size() == 1:
            return local
        slices = [torch.empty_like(local) for _ in range(self.group.size())]
        dist.all_gather(slices, local.contiguous(), group=self.group)
        if not self.gated:
            whole = torch.cat(slices, self.axis)
            return whole[: len(whole) - self.padding]
        halves = [piece.chunk(2, self.axis) for piece in slices]
        return torch.cat([half[part] for part in range(2) for half in halves], self.axis)


def parameter_views(chunks: Sequence[Chunk], groups: Groups) -> Iterator[ParameterView]:
    """The views of all parameters of this rank's chunks (bare), in a fixed order."""
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            yield from _views(name, parameter, chunk, groups)


def weight_views(chunks: Sequence[Chunk], groups: Groups) -> Iterator[ParameterView]:
    """Everything a model of these weights needs: the parameters, and the routers' expert biases."""
    yield from parameter_views(chunks, groups)
    for chunk in chunks:
        for name, buffer in chunk.named_buffers():
            if name.endswith(EXPERT_BIAS):
                yield from _views(name, buffer, chunk, groups)


def _views(
    local_name: str, parameter: torch.Tensor, chunk: Chunk, groups: Groups
) -> Iterator[ParameterView]:
    name, tied = name_in_model(local_name, chunk)
    padding = chunk.vocabulary_padding if name in OF_THE_VOCABULARY else 0
    for view in _views_of(name, parameter, groups, chunk.config.num_moe_experts):
        yield replace(view, padding=padding, tied=tied)


def _views_of(
    name: str, parameter: torch.Tensor, groups: Groups, num_experts: int
) -> Iterator[ParameterView]:
    expert = ".experts." in name
    group = groups.expert_tensor if expert else groups.tensor
    replicas = groups.expert_data if expert else groups.data_context
    sharded = getattr(parameter, "tensor_model_parallel", False) and group.size() > 1
    marked: Any = parameter  # Megatron's marks are attributes
    axis = marked.partition_dim if sharded else None
    gated = ".linear_fc1." in name
    per_expert = re.fullmatch(r"(.*\.experts)\.(linear_fc[12])\.weight(\d*)", name)
    if per_expert is None:
        yield ParameterView(name, parameter, None, axis, gated, group, replicas)
        return
    prefix, linear, number = per_expert.groups()
    if number:  # Transformer Engine: a parameter per expert
        first = groups.expert.rank() * (num_experts // groups.expert.size())
        yield ParameterView(
            f"{prefix}.{first + int(number)}.{linear}.weight",
            parameter, None, axis, gated, group, replicas,
        )  # fmt: skip
        return
    first = groups.expert.rank() * parameter.shape[0]
    for local in range(parameter.shape[0]):
        view_axis = None if axis is None else axis - 1
        yield ParameterView(
            f"{prefix}.{first + local}.{linear}.weight",
            parameter, local, view_axis, gated, group, replicas,
        )  # fmt: skip
