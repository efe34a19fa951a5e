"""SAPO: a smooth gate in the place of the clip."""

from __future__ import annotations

import torch

from megatron_rl.algorithms.aggregate import make_segments, over_sequence_means, over_tokens
from megatron_rl.algorithms.interface import LossInputs, LossOutputs
from megatron_rl.algorithms.loss_metrics import loss_metrics
from megatron_rl.algorithms.mismatch import weigh_tokens
from megatron_rl.algorithms.ratios import shifted_ratio
from megatron_rl.algorithms.shift_modes import range_scale
from megatron_rl.catalogue.losses import SapoSettings


def sapo(inputs: LossInputs, settings: SapoSettings) -> LossOutputs:
    """-1/S sum_i 1/|y_i| sum_t 4/tau sigmoid(tau (w~_t - 1)) A_t. Denominator: sequences.

    arXiv 2511.20347. Gradient 4 p (1 - p) w~_t A_t / |y_i|, p the sigmoid: weight 1 at w~ = 1.
    The gate's width is 1/tau: in the mode range it shrinks to gamma~/tau, which leaves the weight
    at w~ = 1. Nothing is clipped, so clip_fraction is 0; gate_mean is the mean of 4 p (1 - p).
    """
    ratio = shifted_ratio(inputs)
    segments = make_segments(inputs.mask, inputs.sequence_ids, inputs.num_sequences, ratio.dtype)
    advantages = inputs.advantages.detach()
    tau = torch.full_like(ratio, settings.tau_negative)
    tau = tau.masked_fill(advantages > 0, settings.tau_positive)
    scale = range_scale(inputs)
    tau = tau if scale is None else tau / scale
    gate = torch.sigmoid(tau * (ratio - 1))
    objective = weigh_tokens(4 / tau * gate * advantages, inputs)
    total, count = over_sequence_means(-objective, segments)
    nothing = over_tokens(torch.zeros_like(ratio), segments)
    metrics = loss_metrics(inputs, segments, nothing)
    metrics["gate_mean"] = over_tokens((4 * gate * (1 - gate)).detach(), segments)
    return LossOutputs(total, count, metrics)
