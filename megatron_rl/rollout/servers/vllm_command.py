"""The command that starts a vLLM server whose weights can be replaced, and the engine of such."""

from __future__ import annotations

import os
import subprocess
from functools import partial
from pathlib import Path

import megatron_rl
from megatron_rl.config.schema import Config
from megatron_rl.errors import UserError
from megatron_rl.rollout.engine import EngineParts
from megatron_rl.rollout.servers.engine import ServerEngine
from megatron_rl.rollout.servers.vllm import VllmApi

#: Seconds for an interpreter to say what it has.
_ASK_S = 60.0
#: vLLM's names of our types.
_DTYPES = {"fp32": "float32", "bf16": "bfloat16"}


def vllm_engine(parts: EngineParts) -> ServerEngine:
    """Of a run."""
    config = parts.config
    command = partial(vllm_command, config, parts.device.type == "cpu")
    return ServerEngine(parts, VllmApi(config.rollout.servers.reload_method), command)


def vllm_command(
    config: Config, on_cpu: bool, directory: Path, host: str, port: int
) -> tuple[list[str], dict[str, str]]:
    """Words and environment variables; ``directory`` is what it loads first."""
    servers = config.rollout.servers
    assert servers.python is not None, "checked where servers are started"
    mode = "raw_logprobs" if config.rollout.temperature == 1.0 else "processed_logprobs"
    words = [*_serve(servers.python, directory), "--served-model-name", "policy"]
    words += ["--host", host, "--port", str(port)]
    words += ["--dtype", _DTYPES[config.model.dtype]]
    words += ["--max-model-len", str(config.model.max_sequence_length)]
    words += ["--logprobs-mode", mode, "--max-logprobs", "1"]
    words += ["--skip-tokenizer-init", "--enable-scale-out"]
    if on_cpu:
        words += ["--enforce-eager"]  # compiling takes longer than it saves
        # vLLM 0.32 ends where a prompt with a seed is read in parts: it takes back the random
        # numbers of all parts but the last, which torch cannot do on a CPU.
        words += ["--no-enable-chunked-prefill"]
    words += ["--worker-extension-cls", "megatron_rl.rollout.servers.reload.Reload"]
    words += ["--middleware", "megatron_rl.rollout.servers.guard.Guard"]
    if config.algorithm.routing_replay == "r3":
        words += ["--enable-return-routed-experts"]
    root = str(Path(megatron_rl.__file__).parents[1])
    path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    environment = {
        "PYTHONPATH": path,
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_SERVER_DEV_MODE": "1",  # routes that change weights
        "VLLM_API_KEY": "",  # another key than ours, for some of the routes
        "VLLM_CPU_KVCACHE_SPACE": os.environ.get("VLLM_CPU_KVCACHE_SPACE", "1"),
    }
    return [*words, *servers.options], environment


def _serve(python: str, directory: Path) -> list[str]:
    """`vllm serve DIRECTORY` of the interpreter's environment. Where its command cannot run, since
    it asks for the version of a package called vllm, and vllm-cpu is not called so: the module that
    is deprecated since vLLM 0.29.

    Raises:
        UserError: there is no such interpreter.
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
