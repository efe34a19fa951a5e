"""An engine on servers, with a tiny model, in this process."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Sequence

import numpy as np
import torch

from megatron_rl.config.load import load_config
from megatron_rl.config.schema import Config
from megatron_rl.records import Prompt, RolloutGroup
from megatron_rl.rollout.engine import SamplingSettings
from megatron_rl.rollout.servers.own_servers import Command
from tests.support.tiny import cpu_device

PROMPTS = [Prompt(i, np.array(ids), "", {}) for i, ids in enumerate([[5, 9, 3], [7], [11, 12] * 4])]
GREEDY = SamplingSettings(1, 6, greedy=True)
SAMPLED = SamplingSettings(3, 5, seed=4)


def config_of(directory: Path, run_dir: Path, urls: Sequence[str], **parallel: int) -> Config:
    """The configuration of a run on servers, with the model of a directory."""
    argv = [f"--model.hf_path={directory}", f"--run_dir={run_dir}", "--device.kind=cpu"]
    argv += [f"--parallel.{name}={value}" for name, value in parallel.items()]
    argv += ["--rollout.engine=vllm", f"--rollout.servers.urls=[{','.join(urls)}]"]
    argv += ["--rollout.servers.retries=20", "--rollout.servers.deadline_s=300"]
    return load_config(None, argv)


def build(
    config: Config, told: list[str], command: Command | None = None, method: str = "load"
) -> tuple[Any, list[torch.nn.Module], Any, Any]:
    """(engine, chunks, groups, transformer) of this rank.

    told: gets the warnings. method: the worker extension's method that loads weights.
    """
    device = cpu_device()
    from megatron.core import parallel_state

    from megatron_rl.models.build import build_chunks, transformer_config
    from megatron_rl.parallel.groups import build_groups, destroy_groups
    from megatron_rl.policy.initial_weights import load_initial_weights

    if parallel_state.model_parallel_is_initialized():
        destroy_groups()
    groups = build_groups(config.parallel)
    transformer = transformer_config(config.model, config.parallel, device)
    chunks = build_chunks(config.model, transformer, groups, device, config.seed)
    load_initial_weights(config, chunks, groups)
    engine = build_on(config, chunks, groups, told, command, method)
    return engine, chunks, groups, transformer


def build_on(
    config: Config,
    chunks: Sequence[torch.nn.Module],
    groups: Any,
    told: list[str],
    command: Command | None = None,
    method: str = "load",
    stop_ids: Sequence[int] = (1,),
) -> Any:
    """The engine for a model that is already built."""
    from megatron_rl.rollout.engine import EngineParts
    from megatron_rl.rollout.servers.server_engine import ServerEngine
    from megatron_rl.rollout.servers.vllm import VllmApi

    decode = lambda ids: " ".join(map(str, ids))  # noqa: E731
    parts = EngineParts(config, chunks, groups, stop_ids, decode, warn=told.append)
    api = VllmApi(method, masks=config.rollout.keep_sampling_mask)
    return ServerEngine(parts, api, command, broadcast=api)


def change_weights(engine: Any, chunks: Sequence[torch.nn.Module]) -> None:
    """Change every weight and tell the engine, as an update does."""
    with torch.no_grad():
        for parameter in chunks[0].parameters():
            parameter.mul_(1.1)
    engine.weights_changed()


def tokens_of(groups: Sequence[RolloutGroup]) -> list[list[list[int]]]:
    """The tokens of all answers, group by group."""
    return [[answer.tokens.tolist() for answer in group.completions] for group in groups]


def vllm_python() -> str:
    """The interpreter with vLLM that tests with real servers use."""
    python = os.environ.get("MEGATRON_RL_VLLM_PYTHON")
    assert python, "set MEGATRON_RL_VLLM_PYTHON to an interpreter with vLLM"
    return python
