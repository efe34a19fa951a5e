"""The update pass: one optimizer step on the packs of a mini-batch, with the policy loss."""

from __future__ import annotations

import dataclasses
from typing import Any, Sequence

import torch

from megatron_rl.algorithms import LOSSES, LossInputs, make_settings
from megatron_rl.algorithms.aggregate import EMPTY
from megatron_rl.algorithms.mismatch import mismatch_metrics, sampler_weights
from megatron_rl.algorithms.regularisers import add_regularisers
from megatron_rl.algorithms.router_shift import (
    acting_sum,
    layer_divisor,
    normalise_shift,
    shift_weight,
)
from megatron_rl.config.algorithm import uses_router_shift
from megatron_rl.models.router import set_router_loss_scale
from megatron_rl.observe.metrics import MetricSums
from megatron_rl.parallel.collectives import all_reduce, gather_first_dim
from megatron_rl.parallel.sequence_shards import tensor_slice
from megatron_rl.router.telemetry import RouterTelemetry
from megatron_rl.training.batch import PackTensors
from megatron_rl.training.guard import check_step
from megatron_rl.training.loss_plan import LossPlan, mismatch_settings, regularisers
from megatron_rl.training.pass_over_pack import forward_pack, pack_logprobs
from megatron_rl.training.policy import Policy
from megatron_rl.training.schedule import run_schedule
from megatron_rl.training.score import ScoredPack


def update(
    policy: Policy, scored: Sequence[ScoredPack], sums: MetricSums, telemetry: RouterTelemetry
) -> None:
    """Forward, backward and one optimizer step over the packs of a mini-batch.

    Each router measures its distance to the old policy in this same forward pass; the stages add
    theirs to a running sum that reaches the loss with its micro-batch. The loss returns a sum and a
    denominator; Megatron adds both over packs and data-parallel ranks and divides once.

    Args:
        policy: the policy.
        scored: this rank's packs of the mini-batch, with old log-probabilities and traces.
        sums: receives the loss's metrics.
        telemetry: receives the routers' sums.
    """
    packs = [item.pack for item in scored]
    plan = _plan(policy, scored)

    def forward_step(chunk, model, index):
        item = scored[index]
        output, shift = _forward(policy, chunk, model, item, telemetry)
        return output, lambda logits: _loss(policy, item, logits, shift, plan, sums)

    _optimizer_step(policy, packs, forward_step, sums)


def _plan(policy: Policy, scored: Sequence[ScoredPack]) -> LossPlan:
    """What the losses of all packs have in common. A collective."""
    algorithm = policy.config.algorithm
    settings = make_settings(algorithm.name, algorithm.settings)
    beside, per_token, gamma_mean = regularisers(algorithm), None, None
    packs = [item.pack for item in scored]
    if _has_router_losses(policy) or beside.active:
        denominators = [_denominator(policy, pack, settings) for pack in packs]
        if _has_router_losses(policy):
            _scale_router_losses(policy, packs, denominators)
        per_token = _per_token(policy, packs, denominators)
    if uses_router_shift(algorithm) and algorithm.router_shift.normalise == "batch_mean":
        gamma_mean = _gamma_mean(policy, scored)
    return LossPlan(settings, beside, mismatch_settings(algorithm), per_token, gamma_mean)


def _forward(
    policy: Policy,
    chunk: int,
    model: torch.nn.Module,
    item: ScoredPack,
    telemetry: RouterTelemetry,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Run a chunk on a pack: its output, and on the last one the distance of all layers [T_local].

    None instead of the distance on other chunks, and without router shift.
    """
    pack, algorithm = item.pack, policy.config.algorithm
    if not uses_router_shift(algorithm):
        return forward_pack(model, pack), None
    mask = tensor_slice(pack.shards.local(pack.mask), policy.groups.tensor)
    with policy.capture.compare(
        chunk, item.traces[chunk], mask, telemetry, algorithm.router_shift.layers
    ) as distance:
        output = forward_pack(model, pack)
    return output, policy.relay.pass_on(chunk, distance())


def _gamma(
    policy: Policy, pack: PackTensors, distance: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The weight gamma~ of the pack's tokens, and the distance it is the exponential of, [T]."""
    shift = policy.config.algorithm.router_shift
    distance = pack.shards.whole(gather_first_dim(distance, policy.groups.tensor))
    layers = layer_divisor(policy.num_moe_layers, shift.layers)
    return shift_weight(distance, layers, shift.floor), distance / layers


@torch.no_grad()
def _gamma_mean(policy: Policy, scored: Sequence[ScoredPack]) -> torch.Tensor:
    """The mean of gamma~ over the tokens of the mini-batch it acts on, 0-d. A collective.

    The loss of the first pack needs it, and gamma~ is known only after the forward pass of the
    last one on the last rank: so all packs go forward once more, without gradients. The result is
    of use on the last stage.
    """
    config = policy.config
    sums = [torch.zeros(2, dtype=torch.float64, device=policy.device.torch_device)]
    unseen = RouterTelemetry(config.model.num_layers, config.model.num_experts, sums[0].device)

    def forward_step(chunk, model, index):
        item = scored[index]
        output, distance = _forward(policy, chunk, model, item, unseen)

        def keep(logits):
            gamma, _ = _gamma(policy, item.pack, distance)
            pack, mode = item.pack, config.algorithm.router_shift.mode
            sums.append(torch.stack(acting_sum(gamma, pack.advantages, pack.mask, mode)))
            return torch.zeros((), device=logits.device), None

        return output, keep

    run_schedule(policy, [item.pack for item in scored], forward_step, forward_only=True)
    policy.relay.finish()
    total, count = all_reduce(torch.stack(sums).sum(0), policy.groups.data)
    return torch.where(count > 0.5, total / count.clamp(min=1.0), 1.0)


def _loss(
    policy: Policy,
    item: ScoredPack,
    logits: torch.Tensor,
    distance: torch.Tensor | None,
    plan: LossPlan,
    sums: MetricSums,
) -> tuple[torch.Tensor, torch.Tensor, dict]:
    """The policy loss of one pack on the last stage: (sum, denominator, report) as Megatron's
    schedule wants it.
    """
    pack, config = item.pack, policy.config
    logprobs, entropy = pack_logprobs(
        logits,
        pack,
        config.rollout.temperature,
        policy.groups,
        differentiable_entropy=plan.regularisers.entropy_coef > 0,
    )
    gamma, shift = None, config.algorithm.router_shift
    if distance is not None:
        gamma, mean_distance = _gamma(policy, pack, distance)
        _add_shift(sums, mean_distance, shift.floor, pack.mask)
        if plan.gamma_mean is not None:
            gamma = normalise_shift(gamma, plan.gamma_mean)
    inputs = LossInputs(
        logprobs=logprobs,
        old_logprobs=item.old_logprobs,
        advantages=pack.advantages,
        mask=pack.mask,
        sequence_ids=pack.sequence_ids,
        router_shift=gamma,
        rollout_logprobs=pack.rollout_logprobs,
        ref_logprobs=item.ref_logprobs,
        num_sequences=pack.num_sequences,
        shift_mode=shift.mode,
        entropy=entropy,
    )
    if plan.mismatch is not None:
        weights = sampler_weights(inputs, plan.mismatch)
        sums.add_all(mismatch_metrics(weights, inputs, plan.mismatch))
        inputs = dataclasses.replace(inputs, sampler_weights=weights)
    result = LOSSES[config.algorithm.name](inputs, plan.settings)
    result = add_regularisers(result, inputs, plan.regularisers, plan.denominator_per_token)
    sums.add("loss", result.loss_sum, result.denominator)
    sums.add("entropy", (entropy.detach() * pack.mask).sum(), pack.mask.sum())
    sums.add_all(result.metrics)
    return result.loss_sum, _counted_once(result.denominator, policy), {}


def _counted_once(denominator: torch.Tensor, policy: Policy) -> torch.Tensor:
    """The denominator as Megatron wants it: an integer, on one of the ranks that share the pack.

    Megatron adds gradients and denominators over packs and over the data x context ranks, and
    divides. Every context rank computes the loss of the whole pack, but its gradients are those
    through its own tokens only, so their sum counts the loss once; the denominators must not be
    counted once a rank.
    """
    counts = denominator if policy.groups.context.rank() == 0 else torch.zeros_like(denominator)
    return counts.round().to(torch.int)


def _add_shift(
    sums: MetricSums, mean_distance: torch.Tensor, floor: float, mask: torch.Tensor
) -> None:
    gamma = torch.exp(-mean_distance)
    count = mask.sum()
    sums.add("router/shift_mean", (gamma * mask).sum(), count)
    sums.add("router/shift_min", torch.where(mask, gamma, 1.0).min(), count)
    sums.add("router/floor_fraction", ((gamma < floor) & mask).sum(), count)


def _has_router_losses(policy: Policy) -> bool:
    return bool(policy.config.model.aux_loss_coeff or policy.config.model.z_loss_coeff)


def _denominator(policy: Policy, pack: PackTensors, settings: Any) -> torch.Tensor:
    """The loss's denominator of a pack, which no log-probability has a part in; known on every
    stage.
    """
    zeros = torch.zeros_like(pack.advantages)
    inputs = LossInputs(
        logprobs=zeros,
        old_logprobs=zeros,
        advantages=pack.advantages,
        mask=pack.mask,
        sequence_ids=pack.sequence_ids,
        router_shift=torch.ones_like(zeros),
        rollout_logprobs=zeros,
        num_sequences=pack.num_sequences,
    )
    return LOSSES[policy.config.algorithm.name](inputs, settings).denominator


def _per_token(
    policy: Policy, packs: Sequence[PackTensors], denominators: Sequence[torch.Tensor]
) -> torch.Tensor:
    """D / N, 0-d: the loss's denominator over the trained tokens of all packs and ranks, see
    `add_regularisers`. A collective.
    """
    trained = sum(pack.mask.sum() for pack in packs)
    local = torch.stack([sum(denominators).double(), trained.double()])
    denominator, total = all_reduce(local, policy.groups.data)
    return denominator / total.clamp(min=EMPTY)


def _scale_router_losses(
    policy: Policy, packs: Sequence[PackTensors], denominators: Sequence[torch.Tensor]
) -> None:
    """Make the routers' losses means over the tokens of all packs: D / N, see `PackRouter`. A
    collective over the data ranks: the context ranks share their packs.
    """
    tokens = sum((pack.sequence_ids < pack.num_sequences).sum() for pack in packs)
    local = torch.stack([sum(denominators).double(), tokens.double()])
    denominator, total = all_reduce(local, policy.groups.data).tolist()
    set_router_loss_scale(policy.chunks, denominator / max(total, 1.0))


def _optimizer_step(policy: Policy, packs, forward_step, sums: MetricSums) -> None:
    """Gradients of the packs, then one guarded step of the optimizer and of the learning rate."""
    for chunk in policy.wrapped:
        chunk.zero_grad_buffer()
    policy.optimizer.zero_grad()
    run_schedule(policy, packs, forward_step, forward_only=False)
    policy.relay.finish()
    policy.scheduler.step(increment=1)
    succeeded, grad_norm, _ = policy.optimizer.step()
    check_step(policy, succeeded, grad_norm)
    sums.add("grad_norm", float(grad_norm))
    sums.add("lr", policy.optimizer.param_groups[0]["lr"])


def supervised_update(policy: Policy, packs: Sequence, sums: MetricSums) -> None:
    """One optimizer step of next-token cross-entropy on the completions, a mean over tokens."""

    def forward_step(chunk, model, index):
        pack = packs[index]
        output = forward_pack(model, pack)

        def loss(logits):
            logprobs, _ = pack_logprobs(logits, pack, 1.0, policy.groups)
            total = -(logprobs * pack.mask).sum()
            count = pack.mask.sum()
            sums.add("loss", total, count)
            return total, _counted_once(count, policy), {}

        return output, loss

    if _has_router_losses(policy):
        _scale_router_losses(policy, packs, [pack.mask.sum() for pack in packs])
    _optimizer_step(policy, packs, forward_step, sums)
