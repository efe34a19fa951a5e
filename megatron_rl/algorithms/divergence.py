"""Distances of two policies at the sampled token alone: token against all others, a Bernoulli.

p = pi_new(y_t), q = the anchor's probability of the same token. The anchor is the sampler mu, or
the old policy of the training engine.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import torch

from megatron_rl.algorithms.interface import LossInputs
from megatron_rl.algorithms.ratios import at_least_float32

Anchor = Literal["sampler", "old"]


def anchored(inputs: LossInputs, anchor: Anchor) -> LossInputs:
    """The inputs with log q in the place of log pi_old, so that ratios are w = p / q. Raises
    ValueError for the sampler without ``rollout_logprobs``.
    """
    if anchor == "old":
        return inputs
    if inputs.rollout_logprobs is None:
        raise ValueError(
            "found no rollout_logprobs in the loss inputs; expected the sampler's log-probability "
            "of every token, which anchors this rule; keep them, or set anchor to old"
        )
    return dataclasses.replace(inputs, old_logprobs=inputs.rollout_logprobs)


def anchor_logprobs(inputs: LossInputs) -> torch.Tensor:
    """log q of inputs that are ``anchored``, [T], detached; 0 outside the mask."""
    return torch.where(inputs.mask.bool(), at_least_float32(inputs.old_logprobs.detach()), 0.0)


def binary_kl(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """KL(a || b) = a log(a / b) + (1 - a) log((1 - a) / (1 - b)) of log a, log b; any shape, nats.

    arXiv 2602.04879, eq. 14. Never negative. 1 - b counts as at least the smallest normal number,
    so that b = 1 gives a large finite value; log-probabilities above 0 count as 0.
    """
    first, second = first.clamp(max=0.0), second.clamp(max=0.0)
    tiny = torch.finfo(first.dtype).tiny
    # expm1: 1 - a keeps its digits where a is almost 1
    rest, other_rest = ((-torch.expm1(x)).clamp(min=tiny) for x in (first, second))
    taken = first.exp() * (first - second)
    return (taken + rest * (rest.log() - other_rest.log())).clamp(min=0.0)
