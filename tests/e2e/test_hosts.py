"""tools/launch/torchrun.sh on two hosts that only the network joins."""

import contextlib
import subprocess
import time

import pytest

from tests.support import hosts
from tests.support.nodes import SCRIPT, environment, wait_for
from tests.support.runs import TIMEOUT_S, reproducible

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(hosts.missing() is not None, reason=str(hosts.missing())),
]


@contextlib.contextmanager
def training(folder, run_dir):
    """The two hosts and the torchrun.sh of each, one rank a host."""
    with hosts.two_hosts() as pair, contextlib.ExitStack() as stack:
        started = []
        for node, host in enumerate(pair):
            env = environment(
                NODES=2,
                NODE_RANK=node,
                RANKS_PER_NODE=1,
                MASTER_ADDR=pair[0].address,
                GLOO_SOCKET_IFNAME=host.interface,
            )
            log = stack.enter_context(open(folder / f"host_{node}.log", "w"))
            words = host.command(SCRIPT, "train", "rl.yaml", "--run_dir", run_dir)
            process = subprocess.Popen(words, cwd=folder, env=env, stdout=log, stderr=log)
            stack.callback(process.wait)
            stack.callback(process.kill)
            started.append(process)
        yield pair, started


def test_two_hosts_give_the_metrics_of_one_and_outlive_the_loss_of_one(folder, rl_run):
    """One is killed in the middle: the other ends within a minute and says why; the same command
    goes on, and ends with the metrics of a single host.
    """
    logs = [folder / f"host_{node}.log" for node in range(2)]
    with training(folder, "runs/hosts") as (pair, started):
        wait_for("step 5/8", logs[0])
        pair[1].kill()
        began = time.monotonic()
        assert started[0].wait(60.0) == 1, logs[0].read_text()
    assert time.monotonic() - began < 60.0
    said = [line for line in logs[0].read_text().splitlines() if "error:" in line]
    assert len(said) == 1 and "lost the other ranks (Connection " in said[0], logs[0].read_text()
    assert "run the same command to continue from the last checkpoint" in said[0]
    assert "Traceback" not in logs[0].read_text()
    with training(folder, "runs/hosts") as (_, started):
        codes = [process.wait(TIMEOUT_S) for process in started]
    assert codes == [0, 0], logs[0].read_text()
    assert "continuing from runs/hosts/checkpoints/step_4 (step 4)" in logs[0].read_text()
    assert reproducible(folder / "runs" / "hosts") == reproducible(folder / "runs" / "rl")
