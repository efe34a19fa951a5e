"""Ragged batches for the losses: unequal lengths, sequences without a trained token, padding."""

from __future__ import annotations

import dataclasses

import torch

from megatron_rl.algorithms import LossInputs, LossOutputs
from megatron_rl.catalogue.settings import Settings
from tests.support.slow_losses import slow_loss


def random_batch(
    seed: int,
    num_sequences: int = 4,
    spread: float = 0.3,
    shift: bool = False,
    dtype: torch.dtype = torch.float64,
) -> LossInputs:
    """Sequences of 1 to 6 positions, up to 3 of padding (id S); log-ratios are normal with the
    given spread.

    Every fourth sequence or so has no trained token. Outside the mask stand NaNs, which must never
    be read.
    """
    rng = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 7, (num_sequences,), generator=rng)
    padding = int(torch.randint(0, 4, (1,), generator=rng))
    ids = torch.cat(
        [
            torch.repeat_interleave(torch.arange(num_sequences), lengths),
            torch.full((padding,), num_sequences),
        ]
    )
    size = len(ids)
    alive = torch.rand(num_sequences + 1, generator=rng) > 0.25
    alive[num_sequences] = False
    mask = (torch.rand(size, generator=rng) > 0.3) & alive[ids]
    old = -3 * torch.rand(size, generator=rng, dtype=torch.float64) - 0.01
    new = old + spread * torch.randn(size, generator=rng, dtype=torch.float64)
    advantages = torch.randn(num_sequences + 1, generator=rng, dtype=torch.float64)
    gamma = 0.8 + 0.2 * torch.rand(size, generator=rng, dtype=torch.float64)
    # the policy of a batch is nowhere surer than exp(-0.01)
    new = new.clamp(max=-0.01)
    mu = (old + 0.1 * torch.randn(size, generator=rng, dtype=torch.float64)).clamp(max=-0.01)
    nan = torch.tensor(torch.nan, dtype=torch.float64)
    return LossInputs(
        logprobs=torch.where(mask, new, nan).to(dtype).requires_grad_(),
        old_logprobs=torch.where(mask, old, nan).to(dtype),
        advantages=torch.where(mask, advantages[ids], nan).to(dtype),
        mask=mask,
        sequence_ids=ids,
        router_shift=torch.where(mask, gamma, nan).to(dtype) if shift else None,
        rollout_logprobs=torch.where(mask, mu, nan).to(dtype),
    )


def batch_of(
    sequences: list[list[float]], advantages: list[float], gammas: list[list[float]] | None = None
) -> LossInputs:
    """One batch from the log-ratios of each sequence; log-probabilities of the old policy and of
    the sampler -1, no mask.
    """
    log_ratios = torch.tensor([x for sequence in sequences for x in sequence], dtype=torch.float64)
    lengths = torch.tensor([len(sequence) for sequence in sequences])
    ids = torch.repeat_interleave(torch.arange(len(sequences)), lengths)
    flat_gammas = None
    if gammas is not None:
        flat_gammas = torch.tensor([g for row in gammas for g in row], dtype=torch.float64)
    return LossInputs(
        logprobs=(log_ratios - 1).requires_grad_(),
        old_logprobs=torch.full_like(log_ratios, -1),
        advantages=torch.tensor(advantages, dtype=torch.float64)[ids],
        mask=torch.ones_like(ids, dtype=torch.bool),
        sequence_ids=ids,
        router_shift=flat_gammas,
        rollout_logprobs=torch.full_like(log_ratios, -1),
    )


def take(
    inputs: LossInputs, places: torch.Tensor, sequence_ids: torch.Tensor | None = None
) -> LossInputs:
    """The batch of the tokens at some places, with fresh leaf log-probabilities."""
    changes = {
        name: value[places].detach()
        for name, value in vars(inputs).items()
        if isinstance(value, torch.Tensor)
    }
    changes["logprobs"] = changes["logprobs"].requires_grad_()
    if sequence_ids is not None:
        changes["sequence_ids"] = sequence_ids
    return dataclasses.replace(inputs, **changes)


def loss_and_gradient(
    outputs: LossOutputs, inputs: LossInputs
) -> tuple[torch.Tensor, torch.Tensor]:
    """loss_sum / denominator and its gradient with respect to the log-probabilities, [T]."""
    loss = outputs.loss_sum / outputs.denominator
    (gradient,) = torch.autograd.grad(loss, inputs.logprobs)
    return loss.detach(), gradient


def slow_value_and_gradient(
    name: str, inputs: LossInputs, settings: Settings
) -> tuple[torch.Tensor, int, torch.Tensor]:
    """(loss_sum, denominator, gradient [T]) of the slow reference."""
    new = inputs.logprobs.detach().clone().requires_grad_()
    shift, weights = inputs.router_shift, inputs.sampler_weights
    total, count = slow_loss(
        name,
        new,
        inputs.old_logprobs.tolist(),
        inputs.advantages.tolist(),
        inputs.mask.tolist(),
        inputs.sequence_ids.tolist(),
        settings.model_dump(),
        None if shift is None else shift.tolist(),
        inputs.shift_mode,
        None if weights is None else weights.tolist(),
        inputs.rollout_logprobs.tolist(),
    )
    gradient = torch.zeros_like(new)
    if total.requires_grad:
        (gradient,) = torch.autograd.grad(total, new)
    return total.detach(), count, gradient
