"""DRPO: DPPO's trust region as a smooth penalty, which also pulls back what lies beyond it."""

from __future__ import annotations

import torch

from megatron_rl.algorithms.aggregate import make_segments, over_tokens
from megatron_rl.algorithms.divergence import anchor_logprobs, anchored
from megatron_rl.algorithms.interface import LossInputs, LossOutputs
from megatron_rl.algorithms.loss_metrics import loss_metrics
from megatron_rl.algorithms.mismatch import weigh_tokens
from megatron_rl.algorithms.ratios import shifted_log_ratio, shifted_ratio
from megatron_rl.algorithms.shift_modes import LEAST_WEIGHT, range_scale
from megatron_rl.catalogue.losses import DrpoSettings

#: log p~ is held constant above this: a probability times gamma~ does not come near.
MAX_LOG_PROBABILITY = 7.0


def drpo(inputs: LossInputs, settings: DrpoSettings) -> LossOutputs:
    """-1/(sum_i |y_i|) sum_i sum_t (r~_t A_t - |A_t| q_t (r~_t - 1)^2 / (2 delta)).

    arXiv 2606.09821, section 3 (gradient: eq. 9); r~ = gamma~ p / q, q the anchor's probability.
    Gradient r~ A (1 - sign(A) (p~ - q) / delta), p~ = q r~: gate_mean is the mean of the factor in
    brackets, which is below 0 beyond p~ - q = delta sign(A). Nothing is clipped, so clip_fraction
    is 0. In the mode range delta_t = delta max(gamma~_t, 1e-6). Denominator: tokens.
    """
    base = anchored(inputs, settings.anchor)
    ratio = shifted_ratio(base)
    log_q = anchor_logprobs(base)
    log_p = (shifted_log_ratio(base) + log_q).clamp(max=MAX_LOG_PROBABILITY)
    shift = log_p.exp() - log_q.exp()
    segments = make_segments(inputs.mask, inputs.sequence_ids, inputs.num_sequences, ratio.dtype)
    advantages = inputs.advantages.detach()
    scale = range_scale(base)
    delta = settings.delta if scale is None else settings.delta * scale.clamp(min=LEAST_WEIGHT)
    # q (r - 1)^2 as (p - q) (r - 1): the square of a large ratio would overflow
    penalty = advantages.abs() * shift * (ratio - 1) / (2 * delta)
    objective = weigh_tokens(advantages * ratio - penalty, inputs)
    total, count = over_tokens(-objective, segments)
    metrics = loss_metrics(inputs, segments, over_tokens(torch.zeros_like(ratio), segments))
    gate = 1 - advantages.sign() * shift.detach() / delta
    metrics["gate_mean"] = over_tokens(gate, segments)
    return LossOutputs(total, count, metrics)
