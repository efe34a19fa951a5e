"""The rollout engine that the configuration asks for."""

from __future__ import annotations

from functools import partial
from typing import Sequence

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_rl.device.launch import Launch
from megatron_rl.rollout.builtin.generate import BuiltinEngine
from megatron_rl.rollout.engine import Engine
from megatron_rl.rollout.servers.api import ServerApi
from megatron_rl.rollout.servers.engine import ServerEngine
from megatron_rl.rollout.servers.sglang import SglangApi, sglang_command
from megatron_rl.rollout.servers.sync import Command
from megatron_rl.rollout.servers.vllm import VllmApi
from megatron_rl.rollout.servers.vllm_command import vllm_command
from megatron_rl.router.capture import RouterCapture
from megatron_rl.training.session import Session


def build_engine(
    session: Session,
    chunks: Sequence[torch.nn.Module],
    transformer: TransformerConfig,
    capture: RouterCapture | None = None,
) -> Engine:
    """Of ``rollout.engine``; to be closed. ``capture``: of the chunks' routers, for replay."""
    config = session.config
    if config.rollout.engine != "builtin":
        api, command = _kind_of_server(session)
        return ServerEngine(
            config,
            api,
            chunks,
            session.groups,
            stop_ids=session.stop_tokens,
            decode=session.tokenizer.decode,
            say=session.console.warn,
            meeting=_meeting(session.launch),
            command=command,
            progress=partial(session.console.phase, "rollout"),
            stop=session.stop.heard,
        )
    return BuiltinEngine(
        chunks=chunks,
        groups=session.groups,
        transformer_config=transformer,
        stop_ids=session.stop_tokens,
        max_batch=config.rollout.max_batch,
        decode=session.tokenizer.decode,
        max_sequence_length=config.model.max_sequence_length,
        capture=capture,
        stop=session.stop.heard,
    )


def _meeting(launch: Launch) -> str | None:
    """The address of rank 0's machine, where ranks run on others."""
    if launch.local_world_size == launch.world_size or launch.master is None:
        return None
    return launch.master[0]


def _kind_of_server(session: Session) -> tuple[ServerApi, Command]:
    config = session.config
    if config.rollout.engine == "sglang":
        return SglangApi(config.model), partial(sglang_command, config)
    on_cpu = session.device.kind == "cpu"
    return VllmApi(config.rollout.servers.reload_method), partial(vllm_command, config, on_cpu)
