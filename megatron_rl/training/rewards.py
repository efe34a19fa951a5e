"""The verifiers that the configuration asks for, on all ranks."""

from __future__ import annotations

from megatron_rl.rewards.chosen import judges
from megatron_rl.rollout.reward_workers import RewardWorkers
from megatron_rl.training.session import Session


def reward_workers(session: Session) -> RewardWorkers:
    """Of the section ``reward``, as many at once as this rank has cores."""
    return RewardWorkers(
        judges(session.config.reward),
        session.launch.cores,
        session.groups,
        session.console,
        session.stop.heard,
    )
