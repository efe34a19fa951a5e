"""Tries a user's own optimizer on small weights before a run starts, in the way
`optimizers.replace` and checkpoints use it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from megatron_rl.catalogue.blame import blame
from megatron_rl.catalogue.entry import OptimizerEntry
from megatron_rl.catalogue.settings import Settings
from megatron_rl.errors import UserError
from megatron_rl.families.common.names import ATTENTION, EXPERT, in_layer, swiglu
from megatron_rl.optimizers.matrices import Matrix
from megatron_rl.optimizers.state import (
    MATRICES,
    prime,
    set_step,
    state_tensors,
    step_of,
    strange_state,
)

_REMEDY = "correct the optimizer"
_RATE = 1e-3


def check_optimizer(row: OptimizerEntry, settings: Settings | None) -> None:
    """Raise UserError if the optimizer raises, is no torch optimizer, leaves weights unchanged,
    moves them at learning rate 0, or resumes from its state with other results.
    """
    who = f"the optimizer {row.name!r}, tried on small weights,"
    with blame(who, _REMEDY):
        _try(who, row, settings)


def _try(who: str, row: OptimizerEntry, settings: Settings | None) -> None:
    first, weights = _made(who, row, settings)
    before = _copies(weights)
    for number in range(2):
        _step(first, weights, number)
    for old, new in zip(before, weights, strict=True):
        if torch.equal(old, new) or not torch.isfinite(new).all():
            raise UserError(
                f"{who} makes {new.flatten()[:3].tolist()} of {old.flatten()[:3].tolist()} in two "
                f"steps; expected other finite weights of every parameter; {_REMEDY}"
            )
    strange = strange_state(first)
    if strange is not None:
        raise UserError(
            f"{who} keeps {strange}; expected a tensor of the parameter's shape with a name of its "
            f"own, or a number 'step', which a checkpoint can hold; {_REMEDY}"
        )
    _check_rate(who, row, settings)
    _check_continuation(who, row, settings, first, weights)


def _check_rate(who: str, row: OptimizerEntry, settings: Settings | None) -> None:
    """The schedule sets the learning rate in the groups and may begin with 0."""
    optimizer, weights = _made(who, row, settings)
    before = _copies(weights)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    _step(optimizer, weights, 0)
    if not all(map(torch.equal, before, weights)):
        raise UserError(
            f"{who} moves weights at learning rate 0; expected it to take group['lr'] in each "
            f"step, which the schedule sets; {_REMEDY}"
        )


def _check_continuation(
    who: str,
    row: OptimizerEntry,
    settings: Settings | None,
    first: torch.optim.Optimizer,
    weights: list[torch.Tensor],
) -> None:
    """Check that the optimizer resumes from `state_tensors` and `step_of` alone."""
    second, others = _made(who, row, settings)
    prime(second)
    for mine, other in zip(weights, others, strict=True):
        other.copy_(mine)
        stored, into = state_tensors(first, mine), state_tensors(second, other)
        if stored.keys() != into.keys():
            raise UserError(
                f"{who} keeps {', '.join(stored) or 'nothing'} after two steps and "
                f"{', '.join(into) or 'nothing'} after one with gradients of 0; expected the same "
                f"from the first step on; {_REMEDY}"
            )
        for name, tensor in into.items():
            tensor.copy_(stored[name])
    set_step(second, step_of(first))
    _step(first, weights, 2)
    _step(second, others, 2)
    if not all(map(torch.equal, weights, others)):
        raise UserError(
            f"{who} does not go on from its state as if it had not been interrupted; expected all "
            "that it keeps in self.state[parameter]: tensors of the parameter's shape, and a "
            f"number 'step'; {_REMEDY}"
        )


def _made(
    who: str, row: OptimizerEntry, settings: Settings | None
) -> tuple[torch.optim.Optimizer, list[torch.Tensor]]:
    """Make the optimizer for a matrix, a stack of two experts' matrices, and a vector."""
    generator = torch.Generator().manual_seed(1)
    shapes = ((4, 6), (2, 6, 4), (6,))
    matrix, experts, vector = (torch.randn(shape, generator=generator) for shape in shapes)
    whole: Any = _Whole  # has what a matrix asks of a view
    of_matrix = (Matrix(whole(in_layer(0, f"{ATTENTION}.linear_proj.weight"), None)),)
    of_experts = tuple(
        Matrix(whole(in_layer(0, swiglu(EXPERT.format(expert=number))[1]), number))
        for number in range(2)
    )
    both = {"lr": _RATE, "max_lr": _RATE, "min_lr": 0.0, "wd_mult": 1.0, "lr_mult": 1.0}
    matrices, rest = [of_matrix, of_experts], [()]
    groups: list[dict[str, Any]] = [
        {**both, "params": [matrix, experts], "weight_decay": 0.1, MATRICES: matrices},
        {**both, "params": [vector], "weight_decay": 0.0, MATRICES: rest},
    ]
    optimizer = row.bind(settings)(groups)
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise UserError(
            f"{who} is of type {type(optimizer).__name__}; expected a torch.optim.Optimizer; "
            f"{_REMEDY}"
        )
    held = [id(one) for group in optimizer.param_groups for one in group["params"]]
    if held != [id(one) for group in groups for one in group["params"]]:
        raise UserError(
            f"{who} has other parameters in its param_groups than it was given; expected the same, "
            f"in the same groups; {_REMEDY}"
        )
    return optimizer, [matrix, experts, vector]


def _step(optimizer: torch.optim.Optimizer, weights: list[torch.Tensor], number: int) -> None:
    generator = torch.Generator().manual_seed(10 + number)
    for weight in weights:
        weight.grad = torch.randn(weight.shape, generator=generator)
    optimizer.step()


def _copies(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    return [tensor.clone() for tensor in tensors]


@dataclass(frozen=True)
class _Whole:
    """Stands in for a `ParameterView`: a weight that this rank holds whole."""

    name: str
    expert: int | None
    gated: bool = False

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor if self.expert is None else tensor[self.expert]

    def gather(self, local: torch.Tensor) -> torch.Tensor:
        return local

    def slice_of(self, whole: torch.Tensor) -> torch.Tensor:
        return whole
