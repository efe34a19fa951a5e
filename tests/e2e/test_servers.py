"""RSPO on Countdown with answers from real vLLM servers: `bash tests/run.sh --servers`."""

import re
import shutil
from pathlib import Path

import numpy as np
import psutil
import pytest

from megatron_rl.config.load import load_config
from megatron_rl.rollout.servers.keys import KEY_VARIABLE
from megatron_rl.rollout.servers.process import ServerProcess
from megatron_rl.rollout.servers.vllm_command import vllm_command
from tests.support.recipe import run_tool
from tests.support.runs import ROOT, records, started, succeed
from tests.support.server_engine import vllm_python

pytestmark = pytest.mark.servers

EXAMPLE = "examples/countdown"
STEPS, SHORT = 20, 6
LONG_S = 1200.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The example's recipe with its data, and its supervised warm-up."""
    vllm_python()  # said before anything is trained
    folder = tmp_path_factory.mktemp("servers")
    here = folder / EXAMPLE
    here.mkdir(parents=True)
    for name in ("sft.yaml", "rspo.yaml"):
        shutil.copy(ROOT / EXAMPLE / name, here)
    sizes = "--sft 30000 --train 20000 --eval 512 --numbers 3 --max-number 50 --ops=+-".split()
    files = [f"{EXAMPLE}/data/{name}.jsonl" for name in ("sft", "train")]
    kind = ["--kind", "char", "--vocab-size", "64", "--out", f"{EXAMPLE}/data/tokenizer.model"]
    for words in (
        ["make_countdown.py", "--out", f"{EXAMPLE}/data", *sizes],
        ["train_tokenizer.py", *files, *kind],
    ):
        run_tool(*words, cwd=folder)
    succeed("sft", f"{EXAMPLE}/sft.yaml", cwd=folder, ranks=2)
    return folder


def words(name, steps, *more):
    settings = ["--run_dir", f"runs/{name}", "--train.steps", str(steps), "--evaluate.every", "0"]
    settings += ["--evaluate.samples", "0", "--evaluate.problems", "64"]
    return ["train", f"{EXAMPLE}/rspo.yaml", *settings, *more]


def on_servers(count):
    start = ["--rollout.servers.start", str(count), "--rollout.servers.python", vllm_python()]
    return ["--rollout.engine", "vllm", *start]


def metrics_of(folder, name):
    return records(folder / "runs" / name / "metrics.jsonl")


def finish(process):
    done = process.wait(LONG_S)
    assert done.code == 0, f"{done.out}\n{done.err}"
    return done


def column(rows, name):
    return np.array([row[name] for row in rows if row["step"] > 0])


@pytest.fixture(scope="module")
def served(folder):
    with started(*words("served", STEPS, *on_servers(1)), cwd=folder, ranks=2) as process:
        finish(process)
    return metrics_of(folder, "served")


def test_the_servers_weights_are_the_trainers_at_every_step(served):
    assert [row["step"] for row in served] == list(range(STEPS + 1))
    for name in ("servers/probe_difference", "mismatch/logprob_max"):
        assert 0 < column(served, name).max() < 1e-3
    assert (column(served, "servers/used") == 1).all()
    assert column(served, "servers/failures").sum() == 0
    assert (column(served, "time/sync_s")[1:] > 0).all()


def test_the_reward_rises_as_with_the_built_in_engine(folder, served):
    with started(*words("builtin", STEPS), cwd=folder, ranks=2) as process:
        finish(process)
    builtin = metrics_of(folder, "builtin")
    # greedily the same weights answer the same
    assert served[0]["eval/pass@1"] == pytest.approx(builtin[0]["eval/pass@1"], abs=1 / 64)
    for rows in (served, builtin):
        solved = column(rows, "reward/solved")
        assert solved[-5:].mean() > solved[:5].mean() + 0.05
    last = [column(rows, "reward/solved")[-5:].mean() for rows in (served, builtin)]
    assert abs(last[0] - last[1]) < 0.08


def test_nothing_is_lost_when_one_of_two_servers_is_killed(folder):
    command = words("killed", SHORT, *on_servers(2))
    run_dir = folder / "runs" / "killed"
    with started(*command, cwd=folder, ranks=2) as process:
        process.wait_for("step 2/6", LONG_S)
        log = run_dir / "servers" / "server_0.log"
        before = log.read_text().count("POST /inference/v1/generate")
        process.wait_until(
            lambda: log.read_text().count("POST /inference/v1/generate") > before + 8
        )
        (port,) = set(
            re.findall(r"Starting vLLM server on http://127.0.0.1:(\d+)", log.read_text())
        )
        victims = [p for p in psutil.process_iter(["cmdline"]) if is_server(p, port)]
        for victim in victims:
            victim.kill()
        assert victims
        finish(process)
    rows = metrics_of(folder, "killed")
    assert [row["step"] for row in rows] == list(range(SHORT + 1))
    assert column(rows, "servers/restarts").sum() == 1
    assert 0 < column(rows, "servers/failures").sum()
    assert column(rows, "mismatch/logprob_max").max() < 1e-3
    # shares of all 128 problems and all 1,024 answers: none is missing, in no step
    for name, count in (("groups/zero_variance_fraction", 128), ("reward/solved", 1024)):
        times = column(rows, name) * count
        np.testing.assert_allclose(times, times.round(), atol=1e-3)


def test_the_next_answers_come_while_these_are_trained_on(folder):
    """One step old; after a kill the problems that were being answered are asked again."""
    command = words("lagging", SHORT, *on_servers(1), "--rollout.lag", "1")
    command += ["--algorithm.mismatch", "tis", "--checkpoint.every", "1"]
    with started(*command, cwd=folder, ranks=2) as process:
        process.wait_for("step 3/6", LONG_S)
        process.kill_ranks()
        process.wait()
    with started(*command, cwd=folder, ranks=2) as process:
        done = finish(process)
    (resumed,) = re.findall(r"continuing from .* [(]step ([23])[)]", done.out)
    rows = metrics_of(folder, "lagging")
    assert [row["step"] for row in rows] == list(range(SHORT + 1))
    fresh = {1, int(resumed) + 1}
    wanted = [0.0 if step in fresh else 1.0 for step in range(1, SHORT + 1)]
    assert column(rows, "rollout/lag").tolist() == wanted
    # one step of training lies between sampler and scoring pass, where the answers are old
    differences = column(rows, "mismatch/logprob_max")
    assert all((d > 1e-3) == bool(lag) for d, lag in zip(differences, wanted))
    assert column(rows, "servers/probe_difference").max() < 1e-3
    # every step has problems of its own: the cursor went on where it stood
    samples = records(folder / "runs" / "lagging" / "samples.jsonl")
    drawn = {step: {s["prompt"] for s in samples if s["step"] == step} for step in range(1, 7)}
    assert all(not drawn[a] & drawn[b] for a in drawn for b in drawn if a < b)


def test_answers_come_two_steps_ahead(folder):
    command = words("ahead", SHORT, *on_servers(1), "--rollout.lag", "2")
    with started(*command, "--algorithm.mismatch", "tis", cwd=folder, ranks=2) as process:
        finish(process)
    rows = metrics_of(folder, "ahead")
    assert [row["step"] for row in rows] == list(range(SHORT + 1))
    # Where an update comes before an answer is begun, it is by newer weights than at its asking.
    lags = column(rows, "rollout/lag")
    assert lags[0] == 0 and (lags <= [0, 1, 2, 2, 2, 2]).all()
    assert lags.max() > 1  # some were begun two updates before they were trained on
    differences = column(rows, "mismatch/logprob_max")
    assert ((differences > 1e-3) == (lags > 0)).all()
    assert column(rows, "servers/probe_difference").max() < 1e-3
    assert column(rows, "servers/failures").sum() == 0
    times = column(rows, "reward/solved") * 1024
    np.testing.assert_allclose(times, times.round(), atol=1e-3)


@pytest.fixture
def standing(folder):
    """A server that runs already, with the warm-up's weights."""
    succeed("convert", "runs/countdown/sft", "hf", cwd=folder)
    config = load_config(
        folder / EXAMPLE / "rspo.yaml", ["--rollout.servers.python", vllm_python()]
    )
    process = ServerProcess("127.0.0.1", folder / "standing.log")
    process.start(*vllm_command(config, True, folder / "hf", "127.0.0.1", process.port))
    try:
        process.wait_until_ready(300.0)
        yield process
    finally:
        process.stop()


def test_weights_reach_a_standing_server_without_a_disk(folder, standing, monkeypatch):
    monkeypatch.setenv(KEY_VARIABLE, standing.key)
    command = words("broadcast", SHORT, "--rollout.engine", "vllm")
    command += ["--rollout.servers.urls", f"[{standing.url}]", "--rollout.servers.sync=broadcast"]
    with started(*command, cwd=folder, ranks=2) as process:
        finish(process)
    rows = metrics_of(folder, "broadcast")
    assert [row["step"] for row in rows] == list(range(SHORT + 1))
    for name in ("servers/probe_difference", "mismatch/logprob_max"):
        assert 0 < column(rows, name).max() < 1e-3
    assert column(rows, "servers/failures").sum() == 0
    assert not (folder / "runs" / "broadcast" / "servers").exists()


def is_server(process, port):
    """The server of this test's run with that port, not its supervisor."""
    command = process.info["cmdline"] or []
    return port in command and "supervisor.py" not in " ".join(command[:3])


def test_servers_end_with_the_run(folder, served):
    left = [
        p.info["cmdline"]
        for p in psutil.process_iter(["cmdline"])
        if any(str(folder) in word for word in p.info["cmdline"] or [])
    ]
    assert left == []
    assert Path(folder / "runs" / "served" / "servers" / "server_0.log").is_file()
