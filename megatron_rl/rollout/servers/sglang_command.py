"""The command that starts an SGLang server, and the engine of SGLang servers."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from megatron_rl.config.schema import Config
from megatron_rl.rollout.engine import EngineParts
from megatron_rl.rollout.servers import sglang_launcher
from megatron_rl.rollout.servers.server_engine import ServerEngine
from megatron_rl.rollout.servers.sglang import SglangApi

#: Config dtype -> SGLang's name of it.
_DTYPES = {"fp32": "float32", "bf16": "bfloat16"}


def sglang_engine(parts: EngineParts) -> ServerEngine:
    """The engine ``sglang`` of a run."""
    return ServerEngine(parts, SglangApi(parts.config.model), partial(sglang_command, parts.config))


def sglang_command(
    config: Config, directory: Path, host: str, port: int
) -> tuple[list[str], dict[str, str]]:
    """The command of a server that loads the weights in ``directory``: argv and environment
    variables.
    """
    servers = config.rollout.servers
    assert servers.python is not None, "the configuration was checked"
    argv = [servers.python, sglang_launcher.__file__, "sglang.launch_server"]
    argv += ["--model-path", str(directory)]
    argv += ["--host", host, "--port", str(port), "--skip-tokenizer-init"]
    argv += ["--dtype", _DTYPES[config.model.dtype]]
    argv += ["--context-length", str(config.model.max_sequence_length)]
    if config.algorithm.routing_replay == "r3":
        argv += ["--enable-return-routed-experts"]
    return [*argv, *servers.options], {"HF_HUB_OFFLINE": "1"}
