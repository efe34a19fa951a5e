"""The update pass: one optimizer step on the packs of a mini-batch, with the policy loss."""

from __future__ import annotations

from functools import reduce
from typing import Any, Callable, Sequence

import torch

from megatron_rl.config.algorithm import uses_router_shift
from megatron_rl.models.router import set_router_loss_scale
from megatron_rl.observe.metrics import MetricSums
from megatron_rl.parallel.collectives import all_reduce
from megatron_rl.policy.batch import PackTensors
from megatron_rl.policy.finite_checks import check_step
from megatron_rl.policy.pass_over_pack import forward_pack, pack_values
from megatron_rl.policy.policy import Policy
from megatron_rl.policy.policy_loss import plan_loss, policy_loss
from megatron_rl.policy.schedule import ForwardStep, run_schedule
from megatron_rl.policy.score import ScoredPack
from megatron_rl.policy.shift_pass import finish_pass, forward_compared
from megatron_rl.policy.token_values import TokenValues
from megatron_rl.router.telemetry import RouterTelemetry


def update(
    policy: Policy,
    scored: Sequence[ScoredPack],
    sums: MetricSums,
    telemetry: RouterTelemetry,
    tokens: TokenValues | None = None,
    before_step: Callable[[list[ScoredPack]], None] | None = None,
) -> list[ScoredPack]:
    """Forward, backward and one optimizer step over the packs of a mini-batch.

    Args:
        policy: the policy.
        scored: this rank's packs of the mini-batch, with old log-probabilities and traces, or not
            scored yet (`unscored`).
        sums: receives the loss's metrics.
        telemetry: receives the routers' sums, with any loss.
        tokens: receives ratio and gamma of the samples that it watches.
        before_step: gets the packs, all of them scored, while the weights are still the old ones;
            it may pass over the model.

    Returns:
        The packs, all of them scored.
    """
    accumulate_gradients(policy, scored, sums, telemetry, tokens)
    after = [item.after_update() for item in scored]
    if before_step is not None:
        before_step(after)
    _optimizer_step(policy, sums)
    return after


def accumulate_gradients(
    policy: Policy,
    scored: Sequence[ScoredPack],
    sums: MetricSums,
    telemetry: RouterTelemetry,
    tokens: TokenValues | None = None,
) -> None:
    """The gradient of a mini-batch's loss, in ``main_grad`` of each parameter; weights stay.

    Each router measures its distance to the old policy in this forward pass; each stage adds its
    layers to a running sum, which reaches the loss with its micro-batch. The loss returns a sum and
    a denominator; Megatron adds both over packs and data-parallel ranks and divides once.

    The arguments are those of `update`.
    """
    packs = [item.pack for item in scored]
    plan = plan_loss(policy, scored)

    def forward_step(chunk: int, model: Any, index: int) -> tuple[Any, Callable[..., Any]]:
        item = scored[index]
        output, distance = forward_compared(
            policy, chunk, model, item, telemetry, plan.layer_penalty
        )

        def loss(hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
            total, denominator = policy_loss(
                policy, item, hidden, distance, plan, sums, telemetry, tokens
            )
            return total, _counted_once(denominator, policy), {}

        return output, loss

    if _has_router_losses(policy):
        _scale_router_losses(policy, packs, plan.denominators)
    _run_backward(policy, packs, forward_step)


def _counted_once(denominator: torch.Tensor, policy: Policy) -> torch.Tensor:
    """The denominator in Megatron's form: an integer, on only one of the ranks that share the pack.

    Megatron adds gradients and denominators over packs and over the data x context ranks, and
    divides. Every context rank computes the loss of the whole pack but has gradients of its own
    tokens only, so the sum of gradients counts the loss once. The sum of denominators must count it
    once too.
    """
    counts = denominator if policy.groups.context.rank() == 0 else torch.zeros_like(denominator)
    return counts.round().to(torch.int)


def _has_router_losses(policy: Policy) -> bool:
    return bool(policy.config.model.aux_loss_coeff or policy.config.model.z_loss_coeff)


def _scale_router_losses(
    policy: Policy, packs: Sequence[PackTensors], denominators: Sequence[torch.Tensor]
) -> None:
    """Make the routers' losses means over the tokens of all packs: D / N, see `PackRouter`. A
    collective over the data ranks: the context ranks share their packs.
    """
    tokens = reduce(torch.add, [(p.sequence_ids < p.num_sequences).sum() for p in packs])
    local = torch.stack([reduce(torch.add, denominators).double(), tokens.double()])
    denominator, total = all_reduce(local, policy.groups.data)
    set_router_loss_scale(policy.chunks, (denominator / total.clamp(min=1.0)).float())


def _run_backward(policy: Policy, packs: Sequence[PackTensors], forward_step: ForwardStep) -> None:
    """Compute the packs' gradients, of all ranks and divided, from nothing."""
    for chunk in policy.wrapped:
        chunk.zero_grad_buffer()
    policy.optimizer.zero_grad()
    shifts = uses_router_shift(policy.config.algorithm)
    run_schedule(policy, packs, forward_step, forward_only=False, measures_shift=shifts)
    finish_pass(policy)


def _optimizer_step(policy: Policy, sums: MetricSums) -> None:
    """Take one optimizer step with finite checks, and advance the learning rate."""
    policy.scheduler.step(increment=1)
    succeeded, grad_norm, _ = policy.optimizer.step()
    check_step(policy, succeeded, grad_norm)
    sums.add("grad_norm", float(grad_norm))
    sums.add("lr", policy.optimizer.param_groups[0]["lr"])


def supervised_update(policy: Policy, packs: Sequence[PackTensors], sums: MetricSums) -> None:
    """One optimizer step of next-token cross-entropy on the completions, a mean over tokens."""

    def forward_step(chunk: int, model: Any, index: int) -> tuple[Any, Callable[..., Any]]:
        pack = packs[index]
        output = forward_pack(model, pack)

        def loss(hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
            values = pack_values(policy, hidden, pack, 1.0)
            total = -(values.logprobs * pack.mask).sum()
            count = pack.mask.sum()
            sums.add("loss", total, count)
            sums.add("accuracy", (values.hits & pack.mask).sum(), count)
            return total, _counted_once(count, policy), {}

        return output, loss

    if _has_router_losses(policy):
        _scale_router_losses(policy, packs, [pack.mask.sum() for pack in packs])
    _run_backward(policy, packs, forward_step)
    _optimizer_step(policy, sums)
