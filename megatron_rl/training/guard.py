"""Stops the run when a step was not finite, and says what went wrong."""

from __future__ import annotations

import math

import torch

from megatron_rl.models.parameters import parameter_views
from megatron_rl.training.policy import Policy


class NotFinite(RuntimeError):
    """A loss, a gradient or a weight became NaN or infinite. Checkpoints on disk are from before
    that.
    """


def check_step(policy: Policy, succeeded: bool, grad_norm: float | None) -> None:
    """Raise `NotFinite` unless the optimizer took a step with a finite gradient norm.

    The gradient norm is a sum over all ranks, so every rank raises together. Each names its own
    first bad gradient.
    """
    if succeeded and grad_norm is not None and math.isfinite(float(grad_norm)):
        return
    bad = [
        view.name
        for view in parameter_views(policy.chunks, policy.groups)
        if view.parameter.requires_grad
        and not torch.isfinite(view.of(view.parameter.main_grad)).all()
    ]
    where = f"{len(bad)} gradients on this rank, first in {bad[0]}" if bad else "on another rank"
    raise NotFinite(
        f"the gradient norm is {grad_norm}; not finite: {where}; "
        "the weights in memory are lost, the last checkpoint is not. "
        "Lower optimizer.lr or optimizer.clip_grad, or look at the samples of the last step"
    )


def check_finite(name: str, tensor: torch.Tensor, mask: torch.Tensor) -> None:
    """Raise `NotFinite` if a per-token quantity has a value that is not finite where the mask is
    set.
    """
    bad = ~torch.isfinite(tensor) & mask
    if bool(bad.any()):
        first = int(bad.nonzero()[0])
        raise NotFinite(
            f"{name} is not finite at {int(bad.sum())} of {int(mask.sum())} tokens, "
            f"first at {first}: {tensor[first]}"
        )
