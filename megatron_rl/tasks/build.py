"""The rollout engine and the reward workers that the configuration asks for."""

from __future__ import annotations

import inspect
from functools import partial
from typing import Sequence

import torch

from megatron_rl.catalogue.blame import made
from megatron_rl.catalogue.entry import EnvironmentEntry
from megatron_rl.config.rollout import (
    engine_of,
    engine_settings,
    environment_of,
    environment_settings,
)
from megatron_rl.device.launch import Launch
from megatron_rl.parallel.collective_try import collective_try
from megatron_rl.rewards.chosen import judges
from megatron_rl.rollout.conversation import ConversationEngine, Environment
from megatron_rl.rollout.engine import Engine, EngineParts
from megatron_rl.rollout.own_engine import own_engine
from megatron_rl.rollout.reward_workers import RewardWorkers
from megatron_rl.router.capture import RouterCapture
from megatron_rl.tasks.task_session import TaskSession


def build_engine(
    session: TaskSession, chunks: Sequence[torch.nn.Module], capture: RouterCapture | None = None
) -> Engine:
    """The engine of ``rollout.engine``, with ``rollout.environment``; the caller closes it.
    ``capture``: of the chunks' routers, for replay.

    Raises:
        UserError: a user's engine raises or is no engine; an environment raises in its constructor.
    """
    engine = _engine_of_answers(session, chunks, capture)
    config = session.config
    row = environment_of(config.rollout)
    if row is None:
        return engine
    return ConversationEngine(
        engine,
        _environment(session, row),
        row.name,
        encode=partial(session.tokenizer.encode, control=config.data.chat == "rendered"),
        max_turns=config.rollout.max_turns,
        max_sequence_length=config.model.max_sequence_length,
        groups=session.groups,
        threads=session.launch.cores,
        stop=session.stop.heard,
    )


def _environment(session: TaskSession, row: EnvironmentEntry) -> Environment:
    settings = environment_settings(session.config.rollout)
    if not inspect.isclass(row.own):
        return row.bind(settings)
    environment: list[Environment] = []
    who = f"the environment {row.name!r}"
    collective_try(session.groups.world, lambda: environment.append(made(who, row.own, settings)))
    return environment[0]


def _engine_of_answers(
    session: TaskSession, chunks: Sequence[torch.nn.Module], capture: RouterCapture | None
) -> Engine:
    rollout = session.config.rollout
    row, settings = engine_of(rollout), engine_settings(rollout)
    parts = EngineParts(
        config=session.config,
        chunks=chunks,
        groups=session.groups,
        stop_ids=tuple(session.stop_tokens),
        decode=session.tokenizer.decode,
        capture=capture,
        warn=session.console.warn,
        progress=partial(session.console.phase, "rollout"),
        meeting=_meeting(session.launch),
        stop=session.stop.heard,
    )
    make = row.bind(settings)
    return make(parts) if row.own is None else own_engine(row, make, parts)


def _meeting(launch: Launch) -> str | None:
    """The address of rank 0's machine, if some ranks run on other machines."""
    if launch.local_world_size == launch.world_size or launch.master is None:
        return None
    return launch.master[0]


def reward_workers(session: TaskSession) -> RewardWorkers:
    """The reward workers of the section ``reward``, one a core of this rank."""
    return RewardWorkers(
        judges(session.config.reward),
        session.launch.cores,
        session.groups,
        session.console,
        session.stop.heard,
    )
