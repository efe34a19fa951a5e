"""Weights for the mismatch between the sampler mu and the training engine pi_old, per token.

All take ``old_logprobs``, ``rollout_logprobs`` float [T] and ``mask`` bool [T], and return a
detached float [T]: 0 outside the mask, 1 where the two engines agree. rho_t = pi_old(y_t) /
mu(y_t). They multiply the terms of a loss: ``LossInputs.sampler_weights``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megatron_rl.algorithms.aggregate import (
    Segments,
    SumAndCount,
    make_segments,
    over_tokens,
    sequence_mean,
    sequence_sum,
)
from megatron_rl.algorithms.interface import LossInputs
from megatron_rl.algorithms.ratios import at_least_float32, exp_ratio


def mismatch_log_ratio(
    old_logprobs: torch.Tensor, rollout_logprobs: torch.Tensor, mask: torch.Tensor
) -> torch.Tensor:
    """log rho_t = log pi_old(y_t) - log mu(y_t), [T], detached; 0 outside the mask."""
    difference = at_least_float32(old_logprobs.detach()) - at_least_float32(
        rollout_logprobs.detach()
    )
    return torch.where(mask.bool(), difference, 0.0)


def tis_weights(
    old_logprobs: torch.Tensor,
    rollout_logprobs: torch.Tensor,
    mask: torch.Tensor,
    cap: float = 2.0,
) -> torch.Tensor:
    """Truncated importance sampling (TIS): min(rho_t, C)."""
    rho = exp_ratio(mismatch_log_ratio(old_logprobs, rollout_logprobs, mask))
    return torch.where(mask.bool(), rho.clamp(max=cap), 0.0)


def mis_token_weights(
    old_logprobs: torch.Tensor,
    rollout_logprobs: torch.Tensor,
    mask: torch.Tensor,
    cap: float = 2.0,
) -> torch.Tensor:
    """Masked importance sampling by token: rho_t where rho_t <= C, else 0."""
    rho = exp_ratio(mismatch_log_ratio(old_logprobs, rollout_logprobs, mask))
    return torch.where(mask.bool() & (rho <= cap), rho, 0.0)


def mis_sequence_weights(
    old_logprobs: torch.Tensor,
    rollout_logprobs: torch.Tensor,
    mask: torch.Tensor,
    sequence_ids: torch.Tensor,
    cap: float = 2.0,
    num_sequences: int | None = None,
) -> torch.Tensor:
    """Masked importance sampling by sequence: rho_i = prod_t rho_t where rho_i <= C, else 0.

    Every token of sequence i gets the weight of i.
    """
    log_rho = mismatch_log_ratio(old_logprobs, rollout_logprobs, mask)
    segments = make_segments(mask, sequence_ids, num_sequences, log_rho.dtype)
    rho = exp_ratio(sequence_sum(log_rho, segments))[segments.ids]
    return torch.where(segments.mask & (rho <= cap), rho, 0.0)


def icepop_weights(
    old_logprobs: torch.Tensor,
    rollout_logprobs: torch.Tensor,
    mask: torch.Tensor,
    low: float = 0.5,
    high: float = 5.0,
) -> torch.Tensor:
    """IcePop: rho_t where low <= rho_t <= high, else 0 (arXiv 2510.18855)."""
    rho = exp_ratio(mismatch_log_ratio(old_logprobs, rollout_logprobs, mask))
    return torch.where(mask.bool() & (rho >= low) & (rho <= high), rho, 0.0)


@dataclass(frozen=True)
class MismatchSettings:
    """Which weights, and their bounds: the cap C of TIS and MIS is ``high``, IcePop has both."""

    kind: str  #: one of ``KINDS``
    low: float = 0.5
    high: float = 2.0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"found mismatch {self.kind!r}; expected one of {', '.join(KINDS)}")


KINDS = ("tis", "mis_token", "mis_sequence", "icepop")


def sampler_weights(inputs: LossInputs, settings: MismatchSettings) -> torch.Tensor:
    """The weights of the settings' kind, [T]. Raises ValueError without ``rollout_logprobs``."""
    if inputs.rollout_logprobs is None:
        raise ValueError(
            "found no rollout_logprobs in the loss inputs; expected the sampler's log-probability "
            "of every token; switch the mismatch correction off, or keep them with the samples"
        )
    both = (inputs.old_logprobs, inputs.rollout_logprobs, inputs.mask)
    if settings.kind == "tis":
        return tis_weights(*both, settings.high)
    if settings.kind == "mis_token":
        return mis_token_weights(*both, settings.high)
    if settings.kind == "icepop":
        return icepop_weights(*both, settings.low, settings.high)
    return mis_sequence_weights(*both, inputs.sequence_ids, settings.high, inputs.num_sequences)


@torch.no_grad()
def mismatch_metrics(
    weights: torch.Tensor, inputs: LossInputs, settings: MismatchSettings
) -> dict[str, SumAndCount]:
    """Over trained tokens, (sum, count) of the weight, and of its being capped or zeroed."""
    free = MismatchSettings(settings.kind, low=0.0, high=float("inf"))
    clipped = (weights != sampler_weights(inputs, free)).to(weights.dtype)
    segments = make_segments(inputs.mask, inputs.sequence_ids, inputs.num_sequences, weights.dtype)
    return {
        "mismatch/weight_mean": over_tokens(weights, segments),
        "mismatch/clipped_fraction": over_tokens(clipped, segments),
    }


def weigh_tokens(terms: torch.Tensor, inputs: LossInputs) -> torch.Tensor:
    """Terms of tokens [T] times their sampler weights; unchanged without any. Weights 1: same bits.

    The denominator stays: a token of weight 0 counts as one whose term is 0.
    """
    if inputs.sampler_weights is None:
        return terms
    weights = at_least_float32(inputs.sampler_weights.detach())
    return terms * torch.where(inputs.mask.bool(), weights, 0.0)


def weigh_sequences(terms: torch.Tensor, inputs: LossInputs, segments: Segments) -> torch.Tensor:
    """Terms of sequences [N] times the mean sampler weight of their tokens; unchanged without any.

    A loss with one ratio a sequence has no terms of tokens. mis_sequence gives all tokens of a
    sequence one weight, which is then the sequence's.
    """
    if inputs.sampler_weights is None:
        return terms
    weights = at_least_float32(inputs.sampler_weights.detach())
    return terms * sequence_mean(weights, segments)
