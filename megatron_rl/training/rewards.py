"""The verifier that the configuration asks for, on all ranks."""

from __future__ import annotations

from megatron_rl.rewards import VERIFIERS
from megatron_rl.rollout.reward_workers import RewardWorkers
from megatron_rl.training.session import Session


def reward_workers(session: Session) -> RewardWorkers:
    """Of ``reward.name``, as many at once as this rank has cores."""
    name = session.config.reward.name
    return RewardWorkers(
        name,
        VERIFIERS[name],
        session.launch.cores,
        session.groups,
        session.console,
        session.stop.heard,
    )
