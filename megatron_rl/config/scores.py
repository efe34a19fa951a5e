"""Whether the sampler's own numbers take the place of a scoring pass (``rollout.scores``)."""

from __future__ import annotations

from megatron_rl.config.algorithm import keeps_trace
from megatron_rl.config.rollout import engine_of
from megatron_rl.config.schema import Config


def why_scored(config: Config) -> str | None:
    """What in the configuration makes the sampler's numbers other than the trainer's; None: nothing
    does.
    """
    rollout = config.rollout
    if engine_of(rollout).name != "builtin":
        return f"rollout.engine {rollout.engine}"
    if config.model.dtype != "fp32":
        return f"model.dtype {config.model.dtype}"
    if rollout.round_weights != "none":
        return f"rollout.round_weights {rollout.round_weights}"
    if rollout.environment is not None:
        return "rollout.environment"
    if config.algorithm.routing_replay == "r3":
        return "algorithm.routing_replay r3"
    return None


def takes_sampler_scores(config: Config) -> bool:
    """Whether a step is to be scored by the sampler: it is more than one mini-batch, since the
    first is scored by its own update.
    """
    wanted = config.rollout.scores != "pass" and config.algorithm.mini_batches > 1
    return wanted and why_scored(config) is None


def takes_sampler_traces(config: Config) -> bool:
    """Whether the sampler is to give a router trace as well."""
    return takes_sampler_scores(config) and keeps_trace(config.algorithm)
