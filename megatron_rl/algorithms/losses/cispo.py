"""CISPO: REINFORCE with a clipped, detached importance weight; no token loses its gradient."""

from __future__ import annotations

import torch

from megatron_rl.algorithms.aggregate import make_segments, over_tokens
from megatron_rl.algorithms.interface import LossInputs, LossOutputs
from megatron_rl.algorithms.loss_metrics import loss_metrics
from megatron_rl.algorithms.mismatch import weigh_tokens
from megatron_rl.algorithms.ratios import at_least_float32, shifted_ratio
from megatron_rl.algorithms.shift_modes import clip_bounds, range_scale
from megatron_rl.catalogue.losses import CispoSettings


def cispo(inputs: LossInputs, settings: CispoSettings) -> LossOutputs:
    """-1/(sum_i |y_i|) sum_i sum_t sg(clip(w~_t)) A_t log pi_new(y_t). Denominator: tokens.

    arXiv 2506.13585, eq. 4-5. Only the gradient has a meaning, not the value. clip_fraction counts
    the weights that were cut, for either sign of A.
    """
    ratio = shifted_ratio(inputs).detach()
    bounds = clip_bounds(1.0, settings.clip_low, settings.clip_high, range_scale(inputs))
    weight = ratio.clamp(*bounds)
    segments = make_segments(inputs.mask, inputs.sequence_ids, inputs.num_sequences, ratio.dtype)
    logprobs = torch.where(segments.mask, at_least_float32(inputs.logprobs), 0.0)
    objective = weigh_tokens(weight * inputs.advantages.detach() * logprobs, inputs)
    total, count = over_tokens(-objective, segments)
    clipped = weight != ratio
    metrics = loss_metrics(inputs, segments, over_tokens(clipped.to(ratio.dtype), segments))
    return LossOutputs(total, count, metrics, clipped)
