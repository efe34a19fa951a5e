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
            command = [SCRIPT, *words, *(last if node == count - 1 else ())]
            started.append(
                subprocess.Popen(command, cwd=folder, env=env, stdout=log, stderr=subprocess.STDOUT)
            )
            started[-1].environment = env
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


@pytest.mark.slow
def test_rank_0_is_on_node_0_though_the_other_starts_first(tmp_path):
    """torchrun's real ranks, of a package that prints where they are. Its c10d sorts by process."""
    (tmp_path / "megatron_rl").mkdir()
    (tmp_path / "megatron_rl" / "__init__.py").touch()
    (tmp_path / "megatron_rl" / "__main__.py").write_text(
        "import os\nprint('rank', os.environ['RANK'])\n"
    )
    port, started = free_port(), []
    for node in (1, 0):
        settings = {"NODES": 2, "NODE_RANK": node, "RANKS_PER_NODE": 2, "PREFLIGHT": 0}
        settings |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        started.append(
            subprocess.Popen(
                [SCRIPT, "train", "c"],
                cwd=tmp_path,
                env=environment(**settings),
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    try:
        said = [process.communicate(timeout=TIMEOUT_S)[0] for process in started]
    finally:
        for process in started:
            kill(process)
    assert [process.returncode for process in started] == [0, 0], said
    ranks = [sorted(line for line in text.splitlines() if line[:5] == "rank ") for text in said]
    assert ranks == [[f"rank {rank}" for rank in pair] for pair in ((2, 3), (0, 1))]


def test_nodes_with_different_configurations_are_told_before_they_start(folder, sft_run):
    words = ["train", "rl.yaml", "--run_dir", "runs/unlike"]
    last = ["--seed", "3", "--rollout.temperature", "0.5"]
    with nodes(folder, *words, last=last, JOB_ID="unlike") as started:
        assert [process.wait(60.0) for process in started] == [2, 2]
    host = socket.gethostname()
    for node in range(2):
        first, second, error = (folder / f"node_{node}.log").read_text().splitlines()
        assert first.startswith("preflight: seed differs: ")
        assert first.endswith(f"on node 0 ({host}); 3 on node 1 ({host})")
        assert second.startswith("preflight: rollout.temperature differs: ")
        assert error.startswith("megatron-rl: error: preflight found 2 differences between 2 nodes")


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
def test_a_rank_that_is_stopped_is_named_on_node_0_and_the_run_goes_on(folder, rl_run):
    words = ["train", "rl.yaml", "--run_dir", "runs/frozen", "--device.silence_s", "3"]
    log = folder / "node_0.log"
    with nodes(folder, *words, JOB_ID="frozen") as (first, second):
        wait_for("step 2/8", log)
        (rank,) = psutil.Process(second.pid).children()
        rank.suspend()
        name = f"rank 1 (process {rank.pid} on {socket.gethostname()})"
        wait_for(f"megatron-rl: warning: {name} has given no sign of life for 3 s", log, 60.0)
        rank.resume()
        wait_for("megatron-rl: warning: rank 1 answers now", log, 60.0)
        assert [process.wait(TIMEOUT_S) for process in (first, second)] == [0, 0]
    assert reproducible(folder / "runs" / "frozen") == reproducible(folder / "runs" / "rl")


@pytest.mark.slow
def test_a_node_that_lost_another_starts_again_and_meets_the_one_in_its_place(folder, rl_run):
    """Node 1 is killed; node 0, with a restart, waits in the preflight until node 1 is back."""
    words = ["train", "rl.yaml", "--run_dir", "runs/again"]
    log = folder / "node_0.log"
    with nodes(folder, *words, JOB_ID="restarts", MAX_RESTARTS=1) as (first, second):
        wait_for("step 5/8", log)
        kill(second)
        wait_for("torchrun.sh: starts again (0 restarts left)", log)
        with open(folder / "node_1.log", "a") as other:
            again = subprocess.Popen(
                second.args, cwd=folder, env=second.environment, stdout=other, stderr=other
            )
        try:
            assert first.wait(TIMEOUT_S) == 0, log.read_text()
            assert again.wait(TIMEOUT_S) == 0
        finally:
            kill(again)
    assert "continuing from runs/again/checkpoints/step_4 (step 4)" in log.read_text()
    assert reproducible(folder / "runs" / "again") == reproducible(folder / "runs" / "rl")


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
        ({"NODES": "two"}, ["train", "c"], "NODES is 'two'; expected a number from 1 to 100000"),
        ({"NODES": 2, "NODE_RANK": 2}, ["train", "c"], "NODE_RANK is '2'; expected a number from"),
        ({"NODES": 2, "NODE_RANK": "08"}, ["train", "c"], "NODE_RANK is '08'; expected a number"),
        ({"RANKS_PER_NODE": "eight"}, ["train", "c"], "RANKS_PER_NODE is 'eight'; expected a nu"),
        ({"RANKS_PER_NODE": "0"}, ["train", "c"], "RANKS_PER_NODE is '0'; expected a number fro"),
        ({"MASTER_PORT": "tcp"}, ["train", "c"], "MASTER_PORT is 'tcp'; expected a number from "),
        ({"MASTER_PORT": 65536}, ["train", "c"], "MASTER_PORT is '65536'; expected a number fro"),
        ({"MASTER_PORT": 65535}, ["train", "c"], "PREFLIGHT_PORT is '65536'; expected a number "),
        ({"PREFLIGHT": "no"}, ["train", "c"], "PREFLIGHT is 'no'; expected a number from 0 to 1"),
        ({"PREFLIGHT_S": "1m"}, ["train", "c"], "PREFLIGHT_S is '1m'; expected a number from 1"),
        ({"SHUTDOWN_S": "-1"}, ["train", "c"], "SHUTDOWN_S is '-1'; expected a number from 1"),
        ({"MAX_RESTARTS": "x"}, ["train", "c"], "MAX_RESTARTS is 'x'; expected a number from 0"),
        ({"PYTHON": "/none/python"}, ["train", "c"], "PYTHON is '/none/python', which is not the"),
        ({"NODES": 2}, ["train", "c"], "MASTER_ADDR is not set with NODES 2; expected the addre"),
        (
            {"NODES": 2, "MASTER_ADDR": "node0:29500"},
            ["train", "c"],
            "MASTER_ADDR is 'node0:29500'; expected a host name or address alone; the port is MAST",
        ),
        (
            {"NODES": 2, "MASTER_ADDR": "tcp://node0"},
            ["train", "c"],
            "MASTER_ADDR is 'tcp://node0'; expected a host name or address alone",
        ),
        (
            {"NODES": 2, "MASTER_ADDR": "node0", "MAX_RESTARTS": 1, "PREFLIGHT": 0},
            ["train", "c"],
            "MAX_RESTARTS is 1 with PREFLIGHT 0; expected PREFLIGHT 1",
        ),
    ],
)
def test_a_wrong_setting_is_one_line(tmp_path, settings, words, message):
    env = environment(**settings)
    done = subprocess.run([SCRIPT, *words], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith(f"torchrun.sh: {message}") and done.stderr.count("\n") == 1


@pytest.fixture
def words_of(tmp_path):
    """The words with which a node of some settings starts its interpreter, a list a start."""
    (tmp_path / "python").write_text('#!/bin/sh\necho "$@"\n')
    (tmp_path / "python").chmod(0o755)

    def start(*words, **settings):
        env = environment(PYTHON=tmp_path / "python", RANKS_PER_NODE=2, **settings)
        done = subprocess.run([SCRIPT, *words], env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return [line.split() for line in done.stdout.splitlines()]

    return start


@pytest.mark.parametrize("address", ["::1", "[::1]", "fd00::a%eth0", "node0.cluster", "10.0.0.2"])
def test_ranks_are_numbered_by_node_rank_at_the_address_without_brackets(words_of, address):
    bare = address.strip("[]")
    meeting, said, ranks = words_of("train", "c", NODES=2, NODE_RANK=1, MASTER_ADDR=address)
    shown = f"[{bare}]:29501" if ":" in bare else f"{bare}:29501"
    assert meeting[-2:] == ["--meet", shown]
    assert " ".join(said) == (
        "torchrun.sh: node 1 of 2 starts; rank 0, which shows the run, is on node 0 (" + bare + ")"
    )
    options = dict(zip(ranks[1:-4:2], ranks[2:-4:2]))
    expected = {"--nnodes": "2", "--nproc-per-node": "2", "--max-restarts": "0"}
    expected |= {"--rdzv-backend": "static", "--node-rank": "1", "--master-addr": bare}
    expected |= {"--master-port": "29500", "--rdzv-id": "megatron_rl"}
    assert options == expected
    assert ranks[-4:] == ["-m", "megatron_rl", "train", "c"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_ends_a_node_that_waits_for_others(tmp_path, number):
    """PYTHON waits in the place of the preflight; it is ended too, and all may be tried again."""
    (tmp_path / "python").write_text(f"#!/bin/sh\ntouch {tmp_path}/asks\nexec sleep 600\n")
    (tmp_path / "python").chmod(0o755)
    env = environment(PYTHON=tmp_path / "python", NODES=2, MASTER_ADDR="localhost")
    process = subprocess.Popen([SCRIPT, "train", "c"], env=env, stderr=subprocess.PIPE, text=True)
    try:
        while not (tmp_path / "asks").exists():
            assert process.poll() is None
        (asking,) = psutil.Process(process.pid).children()
        process.send_signal(number)
        assert process.wait(60.0) == 75
        assert process.stderr.read() == "torchrun.sh: stopped in the preflight\n"
        asking.wait(60.0)
    finally:
        kill(process)


def test_what_an_operator_sets_for_ranks_of_its_own_reaches_none(tmp_path):
    """Kubeflow's pods have RANK, WORLD_SIZE and torchrun's options, as PET_*."""
    (tmp_path / "python").write_text("#!/bin/sh\nenv\n")
    (tmp_path / "python").chmod(0o755)
    env = environment(PYTHON=tmp_path / "python", RANK=1, WORLD_SIZE=4, PET_MAX_RESTARTS=7)
    done = subprocess.run([SCRIPT, "train", "c"], env=env, capture_output=True, text=True)
    names = {line.partition("=")[0] for line in done.stdout.splitlines()}
    assert "PYTHON" in names
    assert not names & {"RANK", "WORLD_SIZE", "LOCAL_RANK", "PET_MAX_RESTARTS"}


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
