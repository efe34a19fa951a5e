"""The rollout engine that the configuration asks for."""

from __future__ import annotations

from functools import partial
from typing import Sequence

import torch

from megatron_rl.config.rollout import engine_of, engine_settings
from megatron_rl.device.launch import Launch
from megatron_rl.rollout.engine import Engine, EngineParts
from megatron_rl.rollout.own_engine import own_engine
from megatron_rl.router.capture import RouterCapture
from megatron_rl.training.session import Session


def build_engine(
    session: Session, chunks: Sequence[torch.nn.Module], capture: RouterCapture | None = None
) -> Engine:
    """Of ``rollout.engine``; to be closed. ``capture``: of the chunks' routers, for replay.

    Raises:
        UserError: an engine of a user's own raises, or is none.
    """
    rollout = session.config.rollout
    row, settings = engine_of(rollout), engine_settings(rollout)
    parts = EngineParts(
        config=session.config,
        chunks=chunks,
        groups=session.groups,
        stop_ids=tuple(session.stop_tokens),
        decode=session.tokenizer.decode,
        capture=capture,
        say=session.console.warn,
        progress=partial(session.console.phase, "rollout"),
        meeting=_meeting(session.launch),
        stop=session.stop.heard,
    )
    make = row.bind(settings)
    return make(parts) if row.own is None else own_engine(row, make, parts)


def _meeting(launch: Launch) -> str | None:
    """The address of rank 0's machine, where ranks run on others."""
    if launch.local_world_size == launch.world_size or launch.master is None:
        return None
    return launch.master[0]
