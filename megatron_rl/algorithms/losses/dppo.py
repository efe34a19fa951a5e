"""DPPO: a policy gradient without the tokens whose probability has moved too far already."""

from __future__ import annotations

from collections.abc import Callable

import torch

from megatron_rl.algorithms.aggregate import make_segments, over_tokens
from megatron_rl.algorithms.divergence import anchor_logprobs, anchored, binary_kl
from megatron_rl.algorithms.interface import LossInputs, LossOutputs
from megatron_rl.algorithms.loss_metrics import loss_metrics
from megatron_rl.algorithms.mismatch import weigh_tokens
from megatron_rl.algorithms.ratios import at_least_float32, shifted_log_ratio, shifted_ratio
from megatron_rl.algorithms.shift_modes import clip_bounds, range_scale
from megatron_rl.catalogue.losses import DppoKlSettings, DppoSettings

#: From log p~ and log q, [T]: how far p~ is from q, above 0 where it is larger.
Moved = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def dppo_tv(inputs: LossInputs, settings: DppoSettings) -> LossOutputs:
    """``_kept_tokens`` within -divergence_low <= p~ - q <= divergence_high.

    arXiv 2602.04879, eq. 11-13 (binary total variation).
    """
    return _kept_tokens(inputs, settings, lambda log_p, log_q: log_p.exp() - log_q.exp())


def dppo_kl(inputs: LossInputs, settings: DppoKlSettings) -> LossOutputs:
    """``_kept_tokens`` within KL(q || p~) <= divergence_high where p~ > q, divergence_low where
    p~ < q.

    arXiv 2602.04879, eq. 11, 12 and 14 (binary KL).
    """

    def signed(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
        return torch.sign(log_p - log_q) * binary_kl(log_q, log_p)

    return _kept_tokens(inputs, settings, signed)


def _kept_tokens(inputs: LossInputs, settings: DppoSettings, moved: Moved) -> LossOutputs:
    """-1/(sum_i |y_i|) sum_i sum_t M_t A_t sg(min(r~_t, ratio_cap)) log p_t. Denominator: tokens.

    r~ = gamma~ p / q, p~ = q r~, q the anchor's probability. M_t = 0 where A_t > 0 and the token
    has moved up beyond divergence_high, or A_t <= 0 and it has moved down beyond divergence_low.
    Only the gradient has a meaning, not the value. clip_fraction counts the tokens left out.
    """
    base = anchored(inputs, settings.anchor)
    ratio = shifted_ratio(base).detach()
    log_q = anchor_logprobs(base)
    distance = moved(shifted_log_ratio(base).detach() + log_q, log_q)
    low, high = clip_bounds(
        0.0, settings.divergence_low, settings.divergence_high, range_scale(base)
    )
    advantages = inputs.advantages.detach()
    left_out = torch.where(advantages > 0, distance > high, distance < low)
    segments = make_segments(inputs.mask, inputs.sequence_ids, inputs.num_sequences, ratio.dtype)
    logprobs = torch.where(segments.mask, at_least_float32(inputs.logprobs), 0.0)
    weight = torch.where(left_out, 0.0, ratio.clamp(max=settings.ratio_cap))
    total, count = over_tokens(-weigh_tokens(weight * advantages * logprobs, inputs), segments)
    metrics = loss_metrics(inputs, segments, over_tokens(left_out.to(ratio.dtype), segments))
    return LossOutputs(total, count, metrics, left_out)
