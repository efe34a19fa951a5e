"""GRPO: the clipped token objective, mean over a sequence's tokens, then over sequences."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megatron_rl.algorithms.aggregate import (
    Segments,
    make_segments,
    over_sequence_means,
    over_tokens,
)
from megatron_rl.algorithms.clipping import is_clipped, pessimistic_clip
from megatron_rl.algorithms.interface import LossInputs, LossOutputs
from megatron_rl.algorithms.loss_metrics import loss_metrics
from megatron_rl.algorithms.mismatch import weigh_tokens
from megatron_rl.algorithms.ratios import shifted_ratio
from megatron_rl.algorithms.shift_modes import clip_bounds, range_scale
from megatron_rl.catalogue.losses import GrpoSettings


@dataclass(frozen=True)
class ClippedTokens:
    """The clipped objective of every token, before any aggregation."""

    objective: torch.Tensor  #: float [T], min(w~ A, clip(w~) A) weighed, to be maximised
    segments: Segments
    metrics: dict[str, tuple[torch.Tensor, torch.Tensor]]
    clipped: torch.Tensor  #: bool [T]


def clipped_tokens(inputs: LossInputs, clip_low: float, clip_high: float) -> ClippedTokens:
    """J_t = min(w~_t A_t, clip(w~_t, 1 - clip_low, 1 + clip_high) A_t), [T].

    PPO's clipped objective (arXiv 1707.06347, eq. 7) times the sampler weight, where there is one;
    with the metrics of the pack.
    """
    ratio = shifted_ratio(inputs)
    segments = make_segments(inputs.mask, inputs.sequence_ids, inputs.num_sequences, ratio.dtype)
    advantages = inputs.advantages.detach()
    bounds = clip_bounds(1.0, clip_low, clip_high, range_scale(inputs))
    objective = advantages * pessimistic_clip(ratio, advantages, *bounds)
    objective = weigh_tokens(objective, inputs)
    clipped = is_clipped(ratio, advantages, *bounds)
    metrics = loss_metrics(inputs, segments, over_tokens(clipped.to(ratio.dtype), segments))
    return ClippedTokens(objective, segments, metrics, clipped)


def grpo(inputs: LossInputs, settings: GrpoSettings) -> LossOutputs:
    """-1/S sum_i 1/|y_i| sum_t J_t (arXiv 2402.03300, eq. 3, no KL). Denominator: sequences."""
    tokens = clipped_tokens(inputs, settings.clip_low, settings.clip_high)
    total, count = over_sequence_means(-tokens.objective, tokens.segments)
    return LossOutputs(total, count, tokens.metrics, tokens.clipped)
