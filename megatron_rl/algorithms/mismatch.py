"""Weights for the mismatch between the sampler mu and the training engine pi_old, per token.

Each is a function of the loss's inputs and its settings (a row of ``catalogue/corrections.py``),
and gives 1 where the two engines agree. rho_t = pi_old(y_t) / mu(y_t). The weights multiply the
terms of a loss: ``LossInputs.sampler_weights``.
"""

from __future__ import annotations

import torch

from megatron_rl.algorithms.aggregate import (
    Segments,
    SumAndCount,
    make_segments,
    over_tokens,
    sequence_mean,
    sequence_sum,
)
from megatron_rl.algorithms.divergence import anchored, binary_kl
from megatron_rl.algorithms.interface import LossInputs, SamplerWeights
from megatron_rl.algorithms.ratios import at_least_float32, exp_ratio, log_ratio
from megatron_rl.catalogue.corrections import (
    CapSettings,
    IcepopSettings,
    KpopSettings,
    OffPolicyMaskSettings,
)


def tis(inputs: LossInputs, settings: CapSettings) -> SamplerWeights:
    """Truncated importance sampling (TIS): min(rho_t, C)."""
    rho = exp_ratio(mismatch_log_ratio(inputs))
    return _cut(inputs, rho, rho.clamp(max=settings.high))


def mis_token(inputs: LossInputs, settings: CapSettings) -> SamplerWeights:
    """Masked importance sampling by token: rho_t where rho_t <= C, else 0."""
    rho = exp_ratio(mismatch_log_ratio(inputs))
    return _cut(inputs, rho, torch.where(rho <= settings.high, rho, 0.0))


def mis_sequence(inputs: LossInputs, settings: CapSettings) -> SamplerWeights:
    """Masked importance sampling by sequence: rho_i = prod_t rho_t where rho_i <= C, else 0.

    Every token of sequence i gets the weight of i.
    """
    log_rho = mismatch_log_ratio(inputs)
    segments = make_segments(inputs.mask, inputs.sequence_ids, inputs.num_sequences, log_rho.dtype)
    rho = exp_ratio(sequence_sum(log_rho, segments))[segments.ids]
    return _cut(inputs, rho, torch.where(rho <= settings.high, rho, 0.0))


def icepop(inputs: LossInputs, settings: IcepopSettings) -> SamplerWeights:
    """IcePop: rho_t where low <= rho_t <= high, else 0 (arXiv 2510.18855)."""
    rho = exp_ratio(mismatch_log_ratio(inputs))
    kept = (rho >= settings.low) & (rho <= settings.high)
    return _cut(inputs, rho, torch.where(kept, rho, 0.0))


def kpop(inputs: LossInputs, settings: KpopSettings) -> SamplerWeights:
    """KPop: rho_t where KL(pi_old || mu) <= phi and KL(mu || pi_old) <= phi, else 0.

    Binary KL, of the token against all others (ringtech.notion.site/kpop, cited with arXiv
    2606.15079). Implementations differ: the kept tokens' weight is rho in AReaL, 1 in a proposal to
    verl (``weigh`` false); prime-rl takes pi_new for pi_old.
    """
    log_rho = mismatch_log_ratio(inputs)
    assert inputs.rollout_logprobs is not None, "mismatch_log_ratio has asked"
    mask = inputs.mask.bool()
    log_old, log_mu = (
        torch.where(mask, at_least_float32(x.detach()), 0.0)
        for x in (inputs.old_logprobs, inputs.rollout_logprobs)
    )
    furthest = torch.maximum(binary_kl(log_old, log_mu), binary_kl(log_mu, log_old))
    rho = exp_ratio(log_rho) if settings.weigh else torch.ones_like(log_rho)
    return _cut(inputs, rho, torch.where(furthest <= settings.phi, rho, 0.0))


def off_policy_mask(inputs: LossInputs, settings: OffPolicyMaskSettings) -> SamplerWeights:
    """Off-policy sequence mask: 0 where A_i < 0 and 1/|y_i| sum_t log(q_t / p_t) > delta, else 1.

    arXiv 2512.02556, eq. 9; p = pi_new, so the weights depend on the policy of this very update.
    q = mu or pi_old (``anchor``). With a ``cap`` the kept answers have the weights of `tis`.
    """
    drift = -log_ratio(anchored(inputs, settings.anchor)).detach()
    segments = make_segments(inputs.mask, inputs.sequence_ids, inputs.num_sequences, drift.dtype)
    far = sequence_mean(drift, segments) > settings.delta
    advantages = sequence_mean(inputs.advantages.detach().to(drift.dtype), segments)
    left_out = (far & (advantages < 0))[segments.ids]
    rho = torch.ones_like(drift)
    kept = rho
    if settings.cap is not None:
        rho = exp_ratio(mismatch_log_ratio(inputs))
        kept = rho.clamp(max=settings.cap)
    return _cut(inputs, rho, torch.where(left_out, 0.0, kept))


def mismatch_log_ratio(inputs: LossInputs) -> torch.Tensor:
    """log rho_t = log pi_old(y_t) - log mu(y_t), [T], detached; 0 outside the mask. Raises
    ValueError without ``rollout_logprobs``.
    """
    if inputs.rollout_logprobs is None:
        raise ValueError(
            "found no rollout_logprobs in the loss inputs; expected the sampler's log-probability "
            "of every token; switch the mismatch correction off, or keep them with the samples"
        )
    difference = at_least_float32(inputs.old_logprobs.detach()) - at_least_float32(
        inputs.rollout_logprobs.detach()
    )
    return torch.where(inputs.mask.bool(), difference, 0.0)


def _cut(inputs: LossInputs, rho: torch.Tensor, kept: torch.Tensor) -> SamplerWeights:
    """What is kept of rho within the mask, and where it is not rho."""
    mask = inputs.mask.bool()
    return SamplerWeights(torch.where(mask, kept, 0.0), mask & (kept != rho))


@torch.no_grad()
def mismatch_metrics(given: SamplerWeights, inputs: LossInputs) -> dict[str, SumAndCount]:
    """Over trained tokens, (sum, count) of the weight, and of its being capped or zeroed."""
    weights, clipped = given.weights, given.clipped.to(given.weights.dtype)
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
