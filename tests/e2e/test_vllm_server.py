"""The engine asks a real vLLM server in its own process: `bash tests/run.sh --servers`."""

import json
import re
from dataclasses import replace
from functools import partial
from pathlib import Path

import httpx
import numpy as np
import pytest

from megatron_rl.records import Prompt
from megatron_rl.rollout.engine import SamplingSettings
from megatron_rl.rollout.servers.broadcast import WeightBroadcast
from megatron_rl.rollout.servers.keys import KEY_VARIABLE
from megatron_rl.rollout.servers.process import ServerProcess
from megatron_rl.rollout.servers.vllm_command import vllm_command
from tests.support import hugging_face
from tests.support.fake_server import wait_for
from tests.support.server_engine import build, build_on, change_weights, config_of, vllm_python
from tests.support.weight_transfer import GlooLink

pytestmark = pytest.mark.servers


def tokens_made(process):
    """How many tokens the server has sampled so far, those of unfinished answers too."""
    headers = {"Authorization": f"Bearer {process.key}"}
    text = httpx.get(f"{process.url}/metrics", headers=headers, timeout=60.0).text
    (count,) = re.findall(r"^vllm:generation_tokens_total{.*} (.+)$", text, re.MULTILINE)
    return float(count)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A server with a tiny model that answers long: what is said, its process, the engine,
    the trainer's chunks, and where its weights lie.
    """
    folder, told = tmp_path_factory.mktemp("tiny"), []
    directory = hugging_face.save("qwen3_moe", folder / "hf")
    model = json.loads((directory / "config.json").read_text())
    longer = model | {"max_position_embeddings": 1024}
    (directory / "config.json").write_text(json.dumps(longer))
    process = ServerProcess("127.0.0.1", folder / "server.log")
    config = config_of(directory, folder / "run", [process.url])
    servers = config.rollout.servers.model_copy(update={"python": vllm_python(), "in_flight": 16})
    rollout = config.rollout.model_copy(update={"servers": servers, "lag": 2})
    config = config.model_copy(update={"rollout": rollout})
    process.start(*vllm_command(config, True, directory, "127.0.0.1", process.port))
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv(KEY_VARIABLE, process.key)
        try:
            process.wait_until_ready(300.0)
            engine, chunks, *_ = build(config, told, method="reload_checkpoint")
            yield told, process, engine, chunks, folder / "run" / "servers" / "weights"
        finally:
            process.stop()


PROMPTS = [Prompt(i, np.array([2 + i, 5, 9]), "", {}) for i in range(16)]


def test_prompts_are_answered_that_are_together_more_than_a_server_reads_at_a_time(tiny):
    told, _, engine, *_ = tiny
    prompts = [replace(prompt, tokens=np.tile(prompt.tokens, 300)) for prompt in PROMPTS]
    found = engine.generate(prompts, SamplingSettings(3, 4, seed=4))
    assert [len(group.completions) for group in found] == [3] * 16
    assert told == []


def test_no_route_answers_without_the_key(tiny):
    """All that the server lists, those that change weights among them, and its list."""
    _, process, *_ = tiny
    headers = {"Authorization": f"Bearer {process.key}"}
    listed = httpx.get(f"{process.url}/openapi.json", headers=headers, timeout=60.0).json()["paths"]
    assert {"/collective_rpc", "/pause", "/update_weights", "/inference/v1/generate"} <= set(listed)
    for path in [*listed, "/metrics", "/openapi.json", "/docs"]:
        for method in listed.get(path, ["get"]):
            for wrong in ({}, {"Authorization": "Bearer " + process.key[:-1]}):
                answer = httpx.request(method, process.url + path, headers=wrong, timeout=60.0)
                assert answer.status_code == 401, path
    command = Path(f"/proc/{process.pid}/cmdline").read_bytes()
    log = process._log
    assert process.key.encode() not in command + log.read_bytes()
    assert log.stat().st_mode & 0o777 == 0o600


def test_answers_that_an_update_breaks_off_go_on_with_the_new_weights(tiny):
    """Every token has the log-probability of the weights that drew it, the old ones first."""
    told, process, engine, chunks, weights = tiny
    # The model is so small that the server may sample all answers before it hears that it is to
    # break them off; then once more.
    for _ in range(10):
        before = tokens_made(process)
        finish_old = engine.begin(PROMPTS, SamplingSettings(3, 1000, seed=4))
        wait_for(lambda least=before + 240: tokens_made(process) >= least, 60.0)
        change_weights(engine, chunks)
        engine.generate([], SamplingSettings(1, 1))
        answers = [(g.prompt, a) for g in finish_old() for a in g.completions]
        if any(a.last_version != a.version for _, a in answers):
            break
    assert told == []
    assert len(answers) == 48 and all(a.finished or len(a.tokens) == 1000 for _, a in answers)
    version = engine.version - 1
    models = [hugging_face.load(weights / f"version_{version + v}") for v in (0, 1)]
    carried = 0
    for prompt, answer in answers:
        old, new = hugging_face.drawn_by(models, prompt, answer, 1e-3)
        switched = len(old) if old.all() else int(old.argmin())
        assert new[switched:].all()
        if answer.version > version:  # nothing of it was there yet
            assert new.all()
        elif answer.last_version == version:  # it had ended
            assert old.all()
        else:
            assert switched > 0
            carried += switched < len(old)
    assert carried


def test_weights_reach_a_server_by_its_own_transfer_and_answers_end_where_ours_do(
    tmp_path, monkeypatch
):
    """vLLM's routes and its reloading, with gloo in the place of NCCL; the server's files name
    every second token as an end token.
    """
    told, link = [], partial(WeightBroadcast, link=GlooLink)
    monkeypatch.setattr("megatron_rl.rollout.servers.broadcast_delivery.WeightBroadcast", link)
    directory = hugging_face.save("qwen3_moe", tmp_path / "hf")
    generation = json.dumps({"eos_token_id": list(range(0, 125, 2)), "repetition_penalty": 1.3})
    (directory / "generation_config.json").write_text(generation)
    process = ServerProcess("127.0.0.1", tmp_path / "server.log")
    options = ("--worker-extension-cls", "tests.support.vllm_gloo.Extension")
    options += ("--weight-transfer-config", '{"backend": "gloo"}')
    config = config_of(directory, tmp_path / "run", [process.url])
    update = {"python": vllm_python(), "options": options, "sync": "broadcast"}
    servers = config.rollout.servers.model_copy(update=update)
    rollout = config.rollout.model_copy(update={"servers": servers})
    config = config.model_copy(update={"rollout": rollout})
    process.start(*vllm_command(config, True, directory, "127.0.0.1", process.port))
    monkeypatch.setenv(KEY_VARIABLE, process.key)
    try:
        process.wait_until_ready(300.0)
        _, chunks, groups, _ = build(config, told)
        engine = build_on(config, chunks, groups, told, stop_ids=(1, 5))
        for version in range(3):
            found = engine.generate(PROMPTS, SamplingSettings(3, 20, seed=4))
            answers = [answer for group in found for answer in group.completions]
            assert {answer.version for answer in answers} == {version}
            ends = [int(answer.tokens[-1]) in (1, 5) for answer in answers]
            assert [answer.finished for answer in answers] == ends
            assert all(len(a.tokens) == 20 for a in answers if not a.finished)
            assert sum(int(token) % 2 == 0 for a in answers for token in a.tokens) > 50
            assert engine.metrics()["servers/probe_difference"] < 1e-3 and told == []
            change_weights(engine, chunks)
    finally:
        process.stop()
    log = (tmp_path / "server.log").read_text()
    assert log.count('"POST /finish_weight_update HTTP/1.1" 200') == 3
    assert '"POST /collective_rpc' not in log
