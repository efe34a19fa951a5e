"""Importance ratios between the policy being trained and the old one, in log space.

A router-shift weight enters here: log w~_t = log w_t + log gamma~_t (arXiv 2510.23027 v2, eq. 11).
The other modes of ``interface.SHIFT_MODES`` leave the ratio alone, for all or for some tokens.
"""

from __future__ import annotations

import torch

from megatron_rl.algorithms.interface import LossInputs

#: exp(60) = 1e26: sums of millions of such tokens stay finite in float32.
MAX_LOG_RATIO = 60.0


def at_least_float32(values: torch.Tensor) -> torch.Tensor:
    """The values in float32, or unchanged where they are float64."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def log_ratio(inputs: LossInputs) -> torch.Tensor:
    """log w_t = log pi_new(y_t) - log pi_old(y_t), [T] nats; 0 and detached outside the mask."""
    difference = at_least_float32(inputs.logprobs) - at_least_float32(inputs.old_logprobs.detach())
    return torch.where(inputs.mask.bool(), difference, 0.0)


def log_shift(inputs: LossInputs) -> torch.Tensor:
    """log gamma~_t, [T], detached unless ``inputs.shift_attached``; 0 outside the mask, and where
    the mode leaves the ratio alone.

    gamma~ = 0 counts as the smallest normal number, whose logarithm is finite. Raises ValueError
    without ``inputs.router_shift``.
    """
    if inputs.router_shift is None:
        raise ValueError(
            "found no router_shift in the loss inputs; expected the weight gamma~ of every token; "
            "switch router shift on, or choose a loss that does without it, such as gmpo"
        )
    gamma = positive_shift(inputs)
    if inputs.shift_mode == "negative_only":
        gamma = torch.where(inputs.advantages.detach() < 0, gamma, 1.0)
    elif inputs.shift_mode != "ratio":
        gamma = torch.ones_like(gamma)
    return gamma.log()


def positive_shift(inputs: LossInputs) -> torch.Tensor:
    """gamma~_t, [T], detached unless ``inputs.shift_attached``; 1 outside the mask, never below the
    smallest normal number.
    """
    assert inputs.router_shift is not None, "asked for by a mode that has it"
    gamma = inputs.router_shift if inputs.shift_attached else inputs.router_shift.detach()
    gamma = at_least_float32(gamma)
    gamma = torch.where(inputs.mask.bool(), gamma, 1.0)
    return gamma.clamp(min=torch.finfo(gamma.dtype).tiny)


def shifted_log_ratio(inputs: LossInputs) -> torch.Tensor:
    """log w~_t = log w_t + ``log_shift``, [T]; log w_t without a router-shift weight.

    gamma~ = 1 changes no bit.
    """
    if inputs.router_shift is None:
        return log_ratio(inputs)
    return log_ratio(inputs) + log_shift(inputs)


def shifted_ratio(inputs: LossInputs) -> torch.Tensor:
    """w~_t, [T], of a loss that is a sum over tokens.

    Raises ValueError in the mode token_weight, which weighs the tokens of a geometric mean.
    """
    if inputs.shift_mode == "token_weight":
        raise ValueError(
            "found shift_mode token_weight in a loss over tokens; expected a loss with one ratio a "
            "sequence, such as gspo, gmpo or rspo; choose one of these or another mode"
        )
    return exp_ratio(shifted_log_ratio(inputs))


def exp_ratio(log_ratios: torch.Tensor) -> torch.Tensor:
    """exp(x), any shape; above x = MAX_LOG_RATIO constant (no gradient), so it never overflows."""
    return log_ratios.clamp(max=MAX_LOG_RATIO).exp()
