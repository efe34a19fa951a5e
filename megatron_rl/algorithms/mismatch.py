"""Weights for the mismatch between the sampler mu and the training engine pi_old, per token.

All take ``old_logprobs``, ``rollout_logprobs`` float [T] and ``mask`` bool [T], and return a
detached float [T]: 0 outside the mask, 1 where the two engines agree. rho_t = pi_old(y_t) /
mu(y_t). A surrogate is multiplied with them.
"""

from __future__ import annotations

import torch

from megatron_rl.algorithms.aggregate import make_segments, sequence_sum
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
