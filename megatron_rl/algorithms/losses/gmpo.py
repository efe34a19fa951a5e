"""GMPO: the geometric mean of the clipped token ratios of a sequence."""

from __future__ import annotations

import torch

from megatron_rl.algorithms.aggregate import (
    make_segments,
    over_sequences,
    over_tokens,
    sequence_mean,
)
from megatron_rl.algorithms.clipping import is_clipped, pessimistic_clip
from megatron_rl.algorithms.interface import LossInputs, LossOutputs
from megatron_rl.algorithms.loss_metrics import loss_metrics
from megatron_rl.algorithms.mismatch import weigh_sequences
from megatron_rl.algorithms.ratios import exp_ratio, shifted_log_ratio
from megatron_rl.algorithms.shift_modes import clip_bounds, mean_weights, range_scale
from megatron_rl.catalogue.losses import GmpoSettings


def geometric_mean_loss(
    inputs: LossInputs,
    settings: GmpoSettings,
    x: torch.Tensor,
    added_after_clip: torch.Tensor | float = 0.0,
) -> LossOutputs:
    """-1/S sum_i A_i G_i, G_i = exp(1/|y_i| sum_t (s min(s x_t, s clip(x_t)) + added_t)).

    s = sign(A_i); x, added: [T]. Gradient: A_i G_i / |y_i| at every unclipped token (in the mode
    token_weight A_i G_i g_t / sum_t g_t). Denominator: sequences.
    """
    segments = make_segments(inputs.mask, inputs.sequence_ids, inputs.num_sequences, x.dtype)
    advantages = inputs.advantages.detach()
    bounds = clip_bounds(0.0, settings.clip_low, settings.clip_high, range_scale(inputs))
    terms = pessimistic_clip(x, advantages, *bounds) + added_after_clip
    ratio = exp_ratio(sequence_mean(terms, segments, mean_weights(inputs)))
    objective = weigh_sequences(sequence_mean(advantages, segments) * ratio, inputs, segments)
    clipped = is_clipped(x, advantages, *bounds)
    metrics = loss_metrics(inputs, segments, over_tokens(clipped.to(x.dtype), segments))
    total, count = over_sequences(-objective, segments)
    return LossOutputs(total, count, metrics, clipped)


def gmpo(inputs: LossInputs, settings: GmpoSettings) -> LossOutputs:
    """``geometric_mean_loss`` of x_t = log w_t (arXiv 2507.20673); log w~_t with router shift."""
    return geometric_mean_loss(inputs, settings, shifted_log_ratio(inputs))
