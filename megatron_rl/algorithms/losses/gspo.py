"""GSPO: one ratio per sequence, the geometric mean of its tokens' ratios, clipped as a whole."""

from __future__ import annotations

from megatron_rl.algorithms.aggregate import make_segments, over_sequences, sequence_mean
from megatron_rl.algorithms.clipping import is_clipped, pessimistic_clip
from megatron_rl.algorithms.interface import LossInputs, LossOutputs
from megatron_rl.algorithms.loss_metrics import loss_metrics
from megatron_rl.algorithms.mismatch import weigh_sequences
from megatron_rl.algorithms.ratios import exp_ratio, shifted_log_ratio
from megatron_rl.algorithms.shift_modes import clip_bounds, mean_weights, range_scale
from megatron_rl.catalogue.losses import GspoSettings


def gspo(inputs: LossInputs, settings: GspoSettings) -> LossOutputs:
    """-1/S sum_i min(s_i A_i, clip(s_i) A_i), s_i = exp(1/|y_i| sum_t log w~_t).

    arXiv 2507.18071, eq. 5-7; gradient (eq. 10) s_i A_i / |y_i| at every token of an unclipped
    sequence. A_i is the mean of the sequence's advantages. In the mode range the sequence's clip
    range shrinks by its mean gamma~. Denominator: sequences.
    """
    x = shifted_log_ratio(inputs)
    segments = make_segments(inputs.mask, inputs.sequence_ids, inputs.num_sequences, x.dtype)
    ratio = exp_ratio(sequence_mean(x, segments, mean_weights(inputs)))
    advantages = sequence_mean(inputs.advantages.detach(), segments)
    scale = range_scale(inputs)
    scale = None if scale is None else sequence_mean(scale, segments)
    bounds = clip_bounds(1.0, settings.clip_low, settings.clip_high, scale)
    objective = advantages * pessimistic_clip(ratio, advantages, *bounds)
    objective = weigh_sequences(objective, inputs, segments)
    clipped = is_clipped(ratio, advantages, *bounds)
    metrics = loss_metrics(inputs, segments, over_sequences(clipped.to(x.dtype), segments))
    total, count = over_sequences(-objective, segments)
    return LossOutputs(total, count, metrics, clipped[segments.ids])
