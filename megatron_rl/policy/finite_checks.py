"""Finite checks: stop the run when a value is NaN or infinite, and name the value."""

from __future__ import annotations

import math
from typing import Any, Sequence

import numpy as np
import torch
from torch.distributed import ProcessGroup

from megatron_rl.models.parameters import parameter_views
from megatron_rl.parallel.collectives import all_max, gather_objects
from megatron_rl.policy.policy import Policy
from megatron_rl.rollout.collect import ScoredGroup


class NotFinite(FloatingPointError):
    """A log-probability, a gradient or a weight became NaN or infinite; raised on all ranks."""


def raise_together(problem: str | None, world: ProcessGroup, device: torch.device) -> None:
    """Raise `NotFinite` on every rank if any rank has a problem; the error names the first. A
    collective: a number where there is none.

    A rank that raised alone would leave the others waiting in their next collective.
    """
    if not all_max(int(problem is not None), world, device):
        return
    problems = gather_objects(problem, world)
    found = [(rank, text) for rank, text in enumerate(problems) if text]
    if not found:
        return
    rank, text = found[0]
    others = "" if len(found) == 1 else f" and {len(found) - 1} more"
    raise NotFinite(
        f"{text} (rank {rank}{others}); the weights in memory are lost, the last checkpoint is "
        "not; lower optimizer.lr or optimizer.clip_grad, or look at the samples of the last step"
    )


def check_step(policy: Policy, succeeded: bool, grad_norm: float | None) -> None:
    """Raise `NotFinite` unless the optimizer took a step with a finite gradient norm.

    The gradient norm is a sum over all ranks, so every rank comes to the same decision.
    """
    if succeeded and grad_norm is not None and math.isfinite(float(grad_norm)):
        return
    bad = [
        view.name
        for view in parameter_views(policy.chunks, policy.groups)
        if view.parameter.requires_grad
        and not torch.isfinite(view.of(_main_grad(view.parameter))).all()
    ]
    problem = f"the gradient norm is {grad_norm}"
    if bad:
        problem += f": {len(bad)} gradients are not finite, first that of {bad[0]}"
    raise_together(problem, policy.groups.world, policy.device.torch_device)


def _main_grad(parameter: Any) -> torch.Tensor:
    """The gradient that Megatron keeps as an attribute of the parameter."""
    return parameter.main_grad


def check_weights(policy: Policy) -> None:
    """Raise `NotFinite` if a weight is not finite, before a checkpoint is written. A collective."""
    bad = [
        view.name
        for view in parameter_views(policy.chunks, policy.groups)
        if not torch.isfinite(view.of(view.parameter.detach())).all()
    ]
    problem = f"{len(bad)} weights are not finite, first {bad[0]}" if bad else None
    raise_together(problem, policy.groups.world, policy.device.torch_device)


def check_answers(
    answers: Sequence[ScoredGroup], world: ProcessGroup, device: torch.device
) -> None:
    """Raise `NotFinite` if the sampler's log-probability of a token is not finite. A collective."""
    bad = [
        scored.group.prompt.index
        for scored in answers
        for completion in scored.group.completions
        if not np.isfinite(completion.written_logprobs).all()
    ]
    problem = None
    if bad:
        problem = (
            f"the sampler's log-probabilities are not finite in {len(bad)} answers, "
            f"first to problem {bad[0]} (from 0)"
        )
    raise_together(problem, world, device)


def not_finite(
    name: str, tensors: Sequence[torch.Tensor], masks: Sequence[torch.Tensor]
) -> str | None:
    """Describe the first value of a per-token quantity that is not finite where the mask is set;
    None: all are finite. Waits for the device once, however many packs there are.
    """
    if not tensors:
        return None
    bad = [~torch.isfinite(tensor) & mask for tensor, mask in zip(tensors, masks, strict=True)]
    if not bool(torch.stack([where.any() for where in bad]).any()):
        return None
    pack = next(number for number, where in enumerate(bad) if bool(where.any()))
    first = int(bad[pack].nonzero()[0])
    return (
        f"{name} is not finite at {int(bad[pack].sum())} of {int(masks[pack].sum())} tokens of a "
        f"pack, first at {first}: {float(tensors[pack][first])}"
    )
