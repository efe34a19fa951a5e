"""tools/launch/torchrun.sh, with two nodes that are processes of this machine."""

import contextlib
import os
import signal
import socket
import subprocess

import psutil
import pytest

from tests.support.nodes import SCRIPT, environment, wait_for
from tests.support.runs import TIMEOUT_S, reproducible


def free_port():
    """One whose successor is free as well: there the nodes meet for the preflight."""
    while True:
        with socket.socket() as free, socket.socket() as next_one:
            free.bind(("127.0.0.1", 0))
            with contextlib.suppress(OSError, OverflowError):
                next_one.bind(("127.0.0.1", free.getsockname()[1] + 1))
                return free.getsockname()[1]


@contextlib.contextmanager
def nodes(folder, *words, count=2, last=(), **settings):
    """One torchrun.sh a node, one rank each; whatever is left at the end is killed.

    The last node has the words ``last`` as well.
    """
    port = free_port()
    started = []
    try:
        for node in range(count):
            env = environment(
                NODES=count,
                NODE_RANK=node,
                RANKS_PER_NODE=1,
                MASTER_ADDR="127.0.0.1",
                MASTER_PORT=port,
                LOGS=folder / "logs" / settings.get("JOB_ID", "job"),
                **settings,
            )
            log = open(folder / f"node_{node}.log", "w")
            started.append(
                subprocess.Popen(
                    [SCRIPT, *words, *(last if node == count - 1 else ())],
                    cwd=folder,
                    env=env,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                )
            )
            log.close()
        yield started
    finally:
        for process in started:
            kill(process)


def kill(process):
    """SIGKILL to a node's agent and ranks, as when the machine dies."""
    with contextlib.suppress(psutil.NoSuchProcess):
        agent = psutil.Process(process.pid)
        for one in [*agent.children(recursive=True), agent]:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
    process.wait()


@pytest.mark.slow
def test_two_nodes_give_the_metrics_of_one(folder, rl_run):
    words = ["train", "rl.yaml", "--run_dir", "runs/nodes"]
    with nodes(folder, *words, JOB_ID="two") as started:
        codes = [process.wait(TIMEOUT_S) for process in started]
    assert codes == [0, 0], (folder / "node_0.log").read_text()
    assert reproducible(folder / "runs" / "nodes") == reproducible(folder / "runs" / "rl")
    logs = sorted((folder / "logs" / "two").glob("node_*/**/stdout.log"))
    assert sum("step 8/8" in log.read_text() for log in logs) == 1 and len(logs) == 2


def test_nodes_with_different_configurations_are_told_before_they_start(folder, sft_run):
    words = ["train", "rl.yaml", "--run_dir", "runs/unlike"]
    with nodes(folder, *words, last=["--seed", "3"], JOB_ID="unlike") as started:
        assert [process.wait(60.0) for process in started] == [2, 2]
    for node in range(2):
        report, error = (folder / f"node_{node}.log").read_text().splitlines()
        assert report.startswith("preflight: config differs: ") and "on node 1 (" in report
        assert error.startswith("megatron-rl: error: preflight found 1 difference between 2 nodes")


@pytest.mark.slow
def test_when_a_node_dies_the_other_ends_and_the_same_command_goes_on(folder, rl_run):
    words = ["train", "rl.yaml", "--run_dir", "runs/dying"]
    log = folder / "node_0.log"
    with nodes(folder, *words, JOB_ID="dies") as started:
        wait_for("step 5/8", log)
        kill(started[1])
        assert started[0].wait(60.0) == 1
    assert log.read_text().count("error: lost the other ranks (Connection ") == 1
    with nodes(folder, *words, JOB_ID="again") as started:
        assert [process.wait(TIMEOUT_S) for process in started] == [0, 0]
    assert "continuing from runs/dying/checkpoints/step_4 (step 4)" in log.read_text()
    assert reproducible(folder / "runs" / "dying") == reproducible(folder / "runs" / "rl")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_a_node_leads_to_a_checkpoint(folder, rl_run, number):
    words = ["train", "rl.yaml", "--run_dir", f"runs/stopped_{number}"]
    log = folder / "node_0.log"
    with nodes(folder, *words, JOB_ID=f"stop{number}") as started:
        wait_for("step 5/8", log)
        for process in started:
            process.send_signal(number)
        assert [process.wait(TIMEOUT_S) for process in started] == [75, 75]  # try again
        text = log.read_text()
        assert "run the same command to continue" in text and "Traceback" not in text
        assert f"torchrun.sh: {number.name}: the ranks were stopped" in text


@pytest.mark.parametrize(
    ("settings", "words", "message"),
    [
        ({}, ["train"], "usage: tools/launch/torchrun.sh VERB CONFIG"),
        ({"NODES": "two"}, ["train", "c"], "NODES is 'two' and NODE_RANK '0'; expected numbers"),
        ({"NODES": 2, "NODE_RANK": 2}, ["train", "c"], "NODE_RANK is 2 with NODES 2; expected 0"),
        ({"NODES": 2}, ["train", "c"], "MASTER_ADDR is not set with NODES 2; expected the addre"),
    ],
)
def test_a_wrong_setting_is_one_line(tmp_path, settings, words, message):
    env = environment(**settings)
    env.pop("MASTER_ADDR", None)
    done = subprocess.run([SCRIPT, *words], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith(f"torchrun.sh: {message}") and done.stderr.count("\n") == 1


def test_a_mistake_is_one_line_and_exit_code_2_on_every_rank_of_a_node(tmp_path):
    env = environment(RANKS_PER_NODE=2)
    words = [SCRIPT, "train", "missing.yaml"]
    done = subprocess.run(words, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 2
    lines = done.stderr.splitlines()
    assert [line for line in lines if line.startswith("megatron-rl: error: ")] == lines[:1]
    assert "missing.yaml" in lines[0]
    assert lines[-1].startswith("torchrun.sh: rank ") and "ended with exit code 2" in lines[-1]
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("nvidia_smi", "ranks"),
    [
        ("exit 127", 1),
        ("echo NVIDIA-SMI has failed; exit 9", 1),
        ("echo 'GPU 0: H100'; echo 'GPU 1: H100'", 2),
    ],
)
def test_a_node_has_a_rank_for_each_gpu_or_one(tmp_path, nvidia_smi, ranks):
    """PYTHON prints its words instead of starting anything."""
    for name, text in (("nvidia-smi", nvidia_smi), ("python", 'echo "$@"')):
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    env = environment(PYTHON=tmp_path / "python", PATH=f"{tmp_path}:{os.environ['PATH']}")
    env.pop("RANKS_PER_NODE", None)
    done = subprocess.run([SCRIPT, "train", "c"], env=env, capture_output=True, text=True)
    assert done.returncode == 0
    assert f"--nnodes 1 --nproc-per-node {ranks} " in done.stdout
    assert done.stdout.endswith(" -m megatron_rl train c\n")
