"""The policy loss of one pack, and the plan that the packs of a mini-batch share."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import reduce
from typing import Callable, Mapping, Sequence

import torch

from megatron_rl.algorithms import LossInputs, LossOutputs, SamplerWeights
from megatron_rl.algorithms.aggregate import EMPTY, Segments, SumAndCount, count_of, make_segments
from megatron_rl.algorithms.mismatch import mismatch_metrics
from megatron_rl.algorithms.regularisers import Regularisers, add_regularisers
from megatron_rl.algorithms.router_shift import normalise_shift, raw_gamma
from megatron_rl.algorithms.weight_spread import weight_sums
from megatron_rl.catalogue.kinds import CORRECTIONS, LOSSES
from megatron_rl.config.algorithm import (
    correction_of,
    correction_settings,
    distance_is_attached,
    loss_of,
    loss_settings,
    uses_router_shift,
)
from megatron_rl.observe.metrics import METRICS, MetricSums
from megatron_rl.parallel.collectives import all_reduce
from megatron_rl.parallel.vocab_head import Entropy
from megatron_rl.policy.batch import PackTensors
from megatron_rl.policy.pass_over_pack import pack_values
from megatron_rl.policy.policy import Policy
from megatron_rl.policy.score import ScoredPack
from megatron_rl.policy.shift_pass import gamma_mean, gamma_of
from megatron_rl.policy.token_values import TokenValues
from megatron_rl.router.telemetry import RouterTelemetry


@dataclass(frozen=True)
class LossPlan:
    """Settings, and the sums over the whole mini-batch that its first loss needs."""

    loss: Callable[[LossInputs], LossOutputs]
    denominators: tuple[torch.Tensor, ...]  #: 0-d, of this rank's packs
    regularisers: Regularisers
    denominator_per_token: torch.Tensor | None  #: 0-d; None where no term is a mean over tokens
    correction: Callable[[LossInputs], SamplerWeights] | None  #: None: no sampler weights
    gamma_mean: torch.Tensor | None  #: 0-d; None: gamma~ is not normalised
    #: 0-d, of `forward_compared`; None: no penalty on the routers' distance, or one whose gradient
    #: the loss has
    layer_penalty: torch.Tensor | None


def plan_loss(policy: Policy, scored: Sequence[ScoredPack]) -> LossPlan:
    """Work out the plan of a mini-batch. A collective where the configuration needs one."""
    algorithm = policy.config.algorithm
    loss, correction = loss_of(algorithm), correction_of(algorithm)
    packs = [item.pack for item in scored]
    denominators = tuple(count_of(loss.denominator, _segments(pack)) for pack in packs)
    beside = Regularisers(
        algorithm.kl_coef,
        algorithm.kl_estimator,
        algorithm.entropy_coef,
        algorithm.router_shift.penalty,
    )
    normalise = uses_router_shift(algorithm) and algorithm.router_shift.normalise == "batch_mean"
    per_token = _per_token(policy, packs, denominators) if beside.active else None
    penalty = None
    if beside.shift_coef and not distance_is_attached(policy.config):
        assert per_token is not None, "a penalty is a mean over tokens"
        penalty = beside.shift_coef * per_token / policy.relay.rule.divisor(policy.num_moe_layers)
    return LossPlan(
        loss=LOSSES.bind(loss, loss_settings(algorithm)),
        denominators=denominators,
        regularisers=beside,
        denominator_per_token=per_token,
        correction=None
        if correction is None
        else CORRECTIONS.bind(correction, correction_settings(algorithm)),
        gamma_mean=gamma_mean(policy, scored) if normalise else None,
        layer_penalty=penalty,
    )


def policy_loss(
    policy: Policy,
    item: ScoredPack,
    hidden: torch.Tensor,
    distance: torch.Tensor | None,
    plan: LossPlan,
    sums: MetricSums,
    telemetry: RouterTelemetry,
    tokens: TokenValues | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum and denominator of a pack's loss; runs on the last stage. A collective.

    Args:
        policy: the policy.
        item: the pack, scored.
        hidden: of this rank's tokens.
        distance: of the routers, see `forward_compared`; None without router shift.
        plan: of the mini-batch.
        sums: receives the loss's metrics.
        telemetry: receives the sums of the weights and the clip fraction by gamma.
        tokens: receives ratio and gamma of the samples that it watches.
    """
    pack, algorithm = item.pack, policy.config.algorithm
    temperature = policy.config.rollout.temperature
    kind: Entropy = "differentiable" if algorithm.entropy_coef > 0 else "detached"
    logprobs, entropy, _ = pack_values(policy, hidden, pack, temperature, entropy=kind)
    assert entropy is not None, "asked for"
    gamma, attached, shift = None, None, algorithm.router_shift
    if distance is not None:
        gamma, attached = gamma_of(policy, pack, distance)
        mean_distance = attached.detach()
        _add_shift(sums, mean_distance, shift.floor, pack.mask)
        if plan.gamma_mean is not None:
            gamma = normalise_shift(gamma, plan.gamma_mean)
    inputs = LossInputs(
        logprobs=logprobs,
        old_logprobs=item.old_policy(logprobs),
        advantages=pack.advantages,
        mask=pack.mask,
        sequence_ids=pack.sequence_ids,
        router_shift=gamma,
        rollout_logprobs=pack.rollout_logprobs,
        ref_logprobs=item.ref_logprobs,
        num_sequences=pack.num_sequences,
        shift_mode=shift.mode,
        entropy=entropy,
        distance=attached,
        shift_attached=not shift.stop_gradient,
    )
    telemetry.weights += weight_sums(inputs)
    if tokens is not None:
        tokens.add(pack, logprobs, inputs.old_logprobs, gamma)
    inputs = _weighed(inputs, plan, sums)
    result = plan.loss(inputs)
    if distance is not None and result.clipped is not None:
        telemetry.clip_split.add(mean_distance, result.clipped, pack.mask)
    result = add_regularisers(result, inputs, plan.regularisers, plan.denominator_per_token)
    sums.add("entropy", (entropy.detach() * pack.mask).sum(), pack.mask.sum())
    _add_metrics(sums, result)
    return result.loss_sum, result.denominator


def _weighed(inputs: LossInputs, plan: LossPlan, sums: MetricSums) -> LossInputs:
    """The inputs with the weights of the sampler correction, if there is one."""
    if plan.correction is None:
        return inputs
    given = plan.correction(inputs)
    sums.add_all(mismatch_metrics(given, inputs))
    return dataclasses.replace(inputs, sampler_weights=given.weights)


def _add_shift(
    sums: MetricSums, mean_distance: torch.Tensor, floor: float, mask: torch.Tensor
) -> None:
    gamma = raw_gamma(mean_distance)
    count = mask.sum()
    sums.add("router/raw_gamma_mean", (gamma * mask).sum(), count)
    sums.add("router/raw_gamma_min", torch.where(mask, gamma, 1.0).min(), count)
    sums.add("router/floor_fraction", ((gamma < floor) & mask).sum(), count)


def _add_metrics(sums: MetricSums, result: LossOutputs) -> None:
    """Add a loss and its metrics; a user's own metric without a row in the table is shown as
    loss/NAME.
    """
    sums.add("loss", result.loss_sum, result.denominator)
    metrics: Mapping[str, SumAndCount] = result.metrics
    sums.add_all({name: pair for name, pair in metrics.items() if name in METRICS})
    own = {name: pair for name, pair in metrics.items() if name not in METRICS}
    sums.add_parts("loss", own)


def _segments(pack: PackTensors) -> Segments:
    return make_segments(pack.mask, pack.sequence_ids, pack.num_sequences, pack.advantages.dtype)


def _per_token(
    policy: Policy, packs: Sequence[PackTensors], denominators: Sequence[torch.Tensor]
) -> torch.Tensor:
    """D / N, 0-d: the loss's denominator over the trained tokens, both of all packs and ranks.

    See `add_regularisers`. A collective over the data ranks: the context ranks share their packs.
    """
    trained = reduce(torch.add, [pack.mask.sum() for pack in packs])
    local = torch.stack([reduce(torch.add, denominators).double(), trained.double()])
    denominator, total = all_reduce(local, policy.groups.data)
    return denominator / total.clamp(min=EMPTY)
