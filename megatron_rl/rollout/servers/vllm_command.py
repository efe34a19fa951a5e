"""The command that starts a vLLM server whose weights can be replaced, and the engine of vLLM
servers.
"""

from __future__ import annotations

import os
import subprocess
from functools import partial
from pathlib import Path

import megatron_rl
from megatron_rl.config.schema import Config
from megatron_rl.errors import UserError
from megatron_rl.rollout.engine import EngineParts
from megatron_rl.rollout.servers.server_engine import ServerEngine
from megatron_rl.rollout.servers.vllm import VllmApi

#: Seconds for the interpreter to say whether it has vLLM.
_ASK_S = 60.0
#: Config dtype -> vLLM's name of it.
_DTYPES = {"fp32": "float32", "bf16": "bfloat16"}


def vllm_engine(parts: EngineParts) -> ServerEngine:
    """The engine ``vllm`` of a run."""
    config = parts.config
    masks = config.rollout.keep_sampling_mask
    api = VllmApi(config.rollout.servers.reload_method, masks=masks)
    command = partial(vllm_command, config, parts.device.type == "cpu")
    return ServerEngine(parts, api, command, broadcast=api)


def vllm_command(
    config: Config, on_cpu: bool, directory: Path, host: str, port: int
) -> tuple[list[str], dict[str, str]]:
    """The command of a server that loads the weights in ``directory``: argv and environment
    variables.

    Raises:
        UserError: the interpreter ``rollout.servers.python`` cannot be run.
    """
    servers = config.rollout.servers
    assert servers.python is not None, "the configuration was checked"
    kept = config.rollout.keep_sampling_mask
    raw = config.rollout.temperature == 1.0 and not kept
    argv = [*_serve(servers.python, directory), "--served-model-name", "policy"]
    argv += ["--host", host, "--port", str(port)]
    argv += ["--dtype", _DTYPES[config.model.dtype]]
    argv += ["--max-model-len", str(config.model.max_sequence_length)]
    argv += ["--logprobs-mode", "raw_logprobs" if raw else "processed_logprobs"]
    argv += ["--max-logprobs", "1"]
    if kept:
        argv += ["--return-sampling-mask"]
    argv += ["--skip-tokenizer-init", "--enable-scale-out"]
    if on_cpu:
        argv += ["--enforce-eager"]  # compiling takes longer than it saves
        # vLLM 0.32 crashes when it reads a seeded prompt in chunks: it rewinds the generator after
        # all chunks but the last, and torch cannot do that on a CPU.
        argv += ["--no-enable-chunked-prefill"]
    argv += ["--worker-extension-cls", "megatron_rl.rollout.servers.reload.Reload"]
    argv += ["--middleware", "megatron_rl.rollout.servers.key_middleware.KeyMiddleware"]
    if config.algorithm.routing_replay == "r3":
        argv += ["--enable-return-routed-experts"]
    root = str(Path(megatron_rl.__file__).parents[1])
    path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    environment = {
        "PYTHONPATH": path,
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_SERVER_DEV_MODE": "1",  # routes that change weights
        "VLLM_API_KEY": "",  # vLLM would ask for it on some routes, in place of our key
        "VLLM_CPU_KVCACHE_SPACE": os.environ.get("VLLM_CPU_KVCACHE_SPACE", "1"),
    }
    if kept:
        environment["VLLM_USE_V2_MODEL_RUNNER"] = "1"  # the other has no sampling masks
    return [*argv, *servers.options], environment


def _serve(python: str, directory: Path) -> list[str]:
    """The beginning of the command: ``vllm serve DIRECTORY``.

    That command asks for the version of a package called vllm, so it cannot run with the package
    vllm-cpu. There the older module is used, which vLLM 0.29 deprecated.

    Raises:
        UserError: the interpreter cannot be run.
    """
    ask = "import importlib.metadata; importlib.metadata.version('vllm')"
    try:
        asked = subprocess.run(
            [python, "-c", ask], capture_output=True, check=False, timeout=_ASK_S
        )
    except subprocess.TimeoutExpired as error:
        raise UserError(
            f"rollout.servers.python {python} does not run a line in {_ASK_S:g} s; expected the "
            "interpreter of an environment with vLLM; correct it"
        ) from error
    except OSError as error:
        raise UserError(
            f"rollout.servers.python {python} cannot be run ({error.strerror}); expected the "
            "interpreter of an environment with vLLM; correct it"
        ) from error
    if asked.returncode == 0:
        return [python, "-m", "vllm.entrypoints.cli.main", "serve", str(directory)]
    return [python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(directory)]
