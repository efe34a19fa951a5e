"""Gradients of several losses on the same mini-batches at the same weights, and how they vary.

The answers are the old policy's; then the weights drift by some optimizer steps, so that ratios and
routers differ from those of the answers, as in the later mini-batches of a training step.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from megatron_rl.algorithms.gradient_noise import GradientNoise, GradientSums, cosines
from megatron_rl.config.algorithm import keeps_trace, uses_router_shift
from megatron_rl.config.schema import AlgorithmConfig
from megatron_rl.data.prompts import number_occurrences
from megatron_rl.errors import UserError
from megatron_rl.observe.metric_table import split_layer
from megatron_rl.observe.metrics import MetricSums
from megatron_rl.policy.batch import pack_mini_batches
from megatron_rl.policy.policy import Policy
from megatron_rl.policy.score import ScoredPack, score
from megatron_rl.policy.update import accumulate_gradients, update
from megatron_rl.records import Prompt
from megatron_rl.rollout.collect import to_samples
from megatron_rl.rollout.engine import Engine, sampling_settings
from megatron_rl.router.telemetry import RouterTelemetry
from megatron_rl.tasks.build import reward_workers
from megatron_rl.tasks.reinforce import global_advantages
from megatron_rl.tasks.task_session import TaskSession

MiniBatch = list[ScoredPack]
#: Keys of the algorithm, and of its router_shift, that the policy and its batch are made with.
_SHARED = ("advantages", "trace_store")
_SHARED_OF_SHIFT = ("distance", "experts", "layers", "quantile", "stop_gradient", "penalty")


@dataclass(frozen=True)
class Measured:
    """What the losses give at the same weights, by the name of the arm."""

    noise: Mapping[str, GradientNoise]
    cosines: Mapping[str, Mapping[str, float]]  #: of the mean gradients
    metrics: Mapping[str, Mapping[str, float]]  #: means over the mini-batches, as a step's


def check_comparable(base: AlgorithmConfig, arms: Mapping[str, AlgorithmConfig]) -> None:
    """Refuse arms that do not differ in their loss alone: one policy and one batch serve them all.
    UserError names the key.
    """
    for name, arm in arms.items():
        pairs = [(key, getattr(base, key), getattr(arm, key)) for key in _SHARED]
        pairs += [
            (f"router_shift.{key}", getattr(base.router_shift, key), getattr(arm.router_shift, key))
            for key in _SHARED_OF_SHIFT
        ]
        for key, ours, theirs in pairs:
            if ours != theirs:
                raise UserError(
                    f"algorithm.{key} is {theirs} in {name} and {ours} in the first arm; expected "
                    "the same, since all arms get the gradients of one batch; leave that arm out"
                )
        if arm.reference != "none" or arm.routing_replay == "r3":
            raise UserError(
                f"arm {name} needs a reference policy or the sampler's experts; expected neither; "
                "leave it out"
            )


def sample_mini_batches(
    session: TaskSession, policy: Policy, engine: Engine, problems: Sequence[Prompt], count: int
) -> list[MiniBatch]:
    """``count`` mini-batches of the size that the configuration gives, of the first problems, with
    answers, advantages, log-probabilities and router traces of the weights as they are.

    Raises:
        UserError: there are not so many problems.
    """
    config = session.config
    size = config.rollout.prompts_per_step // config.algorithm.mini_batches
    if count * size > len(problems):
        raise UserError(
            f"{count} mini-batches of {size} problems; expected at most {len(problems)} problems, "
            "which are in data.train; ask for fewer mini-batches"
        )
    settings = sampling_settings(
        config.rollout,
        samples=config.rollout.samples_per_prompt,
        greedy=False,
        seed=config.seed << 32,
    )
    rewards = reward_workers(session)
    prompts = number_occurrences(problems[: count * size], Counter())
    groups = rewards.score(engine.generate(prompts, settings))
    samples = to_samples(groups, global_advantages(groups, config, session.groups))
    length = size * config.rollout.samples_per_prompt
    slices = [samples[first : first + length] for first in range(0, len(samples), length)]
    packed = pack_mini_batches(slices, config, session.groups, session.device.torch_device)
    return [score(policy, packs, with_traces=True) for packs in packed]


def drift(policy: Policy, mini_batches: Sequence[MiniBatch]) -> dict[str, float]:
    """An optimizer step on each mini-batch; the metrics of these steps."""
    sums, telemetry = _sums(policy), _telemetry(policy)
    for mini_batch in mini_batches:
        update(policy, _for(policy.config.algorithm, mini_batch), sums, telemetry)
    return sums.reduce(policy.groups.world)


def measure(
    policy: Policy, mini_batches: Sequence[MiniBatch], arms: Mapping[str, AlgorithmConfig]
) -> Measured:
    """The gradients of each arm on each mini-batch, at the policy's weights. One rank.

    Args:
        policy: with router capture as all arms need it (`check_comparable`).
        mini_batches: at least two, scored by the old policy.
        arms: name -> the algorithm.
    """
    assert policy.groups.world.size() == 1, "a rank has the whole gradient"
    noise, means, metrics = {}, {}, {}
    for name, algorithm in arms.items():
        own = replace(
            policy,
            config=policy.config.model_copy(update={"algorithm": algorithm}),
            replay=policy.replay if algorithm.routing_replay != "none" else None,
        )
        found, sums, telemetry = GradientSums(), _sums(own), _telemetry(own)
        for gradient in gradients(own, mini_batches, sums, telemetry):
            found.add(gradient)
        noise[name], means[name] = found.noise(), found.mean
        reduced = sums.reduce(own.groups.world) | telemetry.reduce(own.groups.world)
        metrics[name] = {key: value for key, value in reduced.items() if not split_layer(key)}
    return Measured(noise, cosines(means), metrics)


def gradients(
    policy: Policy,
    mini_batches: Sequence[MiniBatch],
    sums: MetricSums,
    telemetry: RouterTelemetry,
) -> Iterator[torch.Tensor]:
    """The gradient of each mini-batch, [P] of all parameters in their order; not clipped."""
    for mini_batch in mini_batches:
        packs = _for(policy.config.algorithm, mini_batch)
        accumulate_gradients(policy, packs, sums, telemetry)
        trained = (p for chunk in policy.wrapped for p in chunk.parameters() if p.requires_grad)
        yield torch.cat([parameter.main_grad.flatten() for parameter in trained])


def _for(algorithm: AlgorithmConfig, mini_batch: MiniBatch) -> MiniBatch:
    """The packs as the loss gets them: with traces only if it looks at them."""
    if keeps_trace(algorithm):
        return mini_batch
    return [replace(item, traces=()) for item in mini_batch]


def _sums(policy: Policy) -> MetricSums:
    return MetricSums(policy.config.model.num_layers, policy.device.torch_device)


def _telemetry(policy: Policy) -> RouterTelemetry:
    config = policy.config
    shifts = uses_router_shift(config.algorithm)
    return RouterTelemetry(
        config.model.num_layers,
        config.model.num_experts,
        policy.device.torch_device,
        floor=config.algorithm.router_shift.floor if shifts else 0.0,
    )
