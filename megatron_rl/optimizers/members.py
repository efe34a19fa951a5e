"""The optimizers in Megatron's chain, and the weights that each one steps."""

from __future__ import annotations

from typing import Iterator

import torch
from megatron.core.optimizer.optimizer import (
    ChainedOptimizer,
    Float16OptimizerWithFloat16Params,
    FP32Optimizer,
    MegatronOptimizer,
)


def members(optimizer: MegatronOptimizer) -> list[MegatronOptimizer]:
    """The optimizers of a chain, for dense and for expert parameters, without empty ones."""
    chain = optimizer.chained_optimizers if isinstance(optimizer, ChainedOptimizer) else [optimizer]
    return [member for member in chain if not getattr(member, "is_stub_optimizer", False)]


def main_parameters(
    member: MegatronOptimizer,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """(parameter of the model, main parameter of the optimizer); an fp32 parameter is its own main
    parameter. Not for the distributed optimizer.
    """
    if isinstance(member, FP32Optimizer):
        for group in member.optimizer.param_groups:
            yield from ((parameter, parameter) for parameter in group["params"])
        return
    assert isinstance(member, Float16OptimizerWithFloat16Params), type(member)
    for group, main_group in zip(
        member.float16_groups, member.fp32_from_float16_groups, strict=True
    ):
        yield from zip(group, main_group, strict=True)
    for group in member.fp32_from_fp32_groups:
        yield from ((parameter, parameter) for parameter in group)
