"""Decides what is due after a step."""

from __future__ import annotations

from megatron_rl.config.schema import Config
from megatron_rl.observe.run_files import last_evaluated
from megatron_rl.parallel.collective_try import collective_try
from megatron_rl.run.session import Session


def due(every: int, number: int) -> bool:
    """Whether something that is done every ``every`` steps is due after step ``number``; 0:
    never.
    """
    return every > 0 and number % every == 0


def evaluation_due(config: Config, number: int) -> bool:
    """Whether an evaluation follows step ``number``."""
    if config.data.eval is None:
        return False
    return due(config.evaluate.every, number) or number == config.train.steps


def evaluation_missing(session: Session, done: int) -> bool:
    """Whether the step was recorded without the evaluation that was due. A collective."""
    return (
        evaluation_due(session.config, done)
        and collective_try(
            session.groups.world,
            lambda: session.is_main and last_evaluated(session.run_dir, done) is False,
        )[0]
    )
