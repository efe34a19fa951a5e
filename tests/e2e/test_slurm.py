"""The shipped sbatch file on a real Slurm of two nodes on this machine."""

import os
import subprocess
import sys

import pytest

from tests.support import slurm
from tests.support.runs import ROOT, reproducible

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(slurm.missing() is not None, reason=str(slurm.missing())),
]


@pytest.fixture(scope="module")
def environment(folder, tmp_path_factory):
    """Of the cluster; jobs are submitted from the recipe's folder, which has tools/."""
    (folder / "tools").symlink_to(ROOT / "tools")
    with slurm.cluster(tmp_path_factory.mktemp("slurm") / "cluster") as environment:
        settings = {"PYTHON": sys.executable, "PYTHONPATH": str(ROOT), "RANKS_PER_NODE": "1"}
        yield {**environment, **settings}


def submit(folder, environment, name, options=(), words=()):
    """The number of a job of two nodes, and its log."""
    command = ["sbatch", "--parsable", "--nodes", "2", *options]
    command += [str(ROOT / "tools/launch/slurm.sbatch"), "train", "rl.yaml"]
    command += ["--run_dir", f"runs/{name}", *words]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    job = done.stdout.strip()
    return job, folder / f"slurm-{job}.log"


def test_a_job_of_two_nodes_gives_the_metrics_of_one_machine(folder, rl_run, environment):
    job, log = submit(folder, environment, "slurm")
    ended = ("COMPLETED", "FAILED", "CANCELLED", "NODE_FAIL")
    slurm.wait_until(lambda: slurm.state(environment, job) in ended, log)
    assert slurm.state(environment, job) == "COMPLETED", log.read_text()
    assert reproducible(folder / "runs" / "slurm") == reproducible(folder / "runs" / "rl")


def test_a_requeued_job_goes_on_from_the_checkpoint_it_left(folder, rl_run, environment):
    job, log = submit(folder, environment, "requeued")
    slurm.wait_until(lambda: log.exists() and "step 2/8" in log.read_text(), log)
    slurm.ask(environment, "scontrol", "requeue", job)
    slurm.wait_until(lambda: "run the same command to continue" in log.read_text(), log)
    slurm.start_again(environment, job, log)
    slurm.wait_until(lambda: slurm.state(environment, job) in ("COMPLETED", "FAILED"), log)
    text = log.read_text()
    assert slurm.state(environment, job) == "COMPLETED", text
    assert "continuing from runs/requeued/checkpoints/step_" in text
    assert reproducible(folder / "runs" / "requeued") == reproducible(folder / "runs" / "rl")
    assert os.path.exists(folder / "runs" / "requeued" / "report.html")


def test_a_job_whose_time_is_over_is_queued_again(folder, rl_run, environment):
    options = ["--time", "2", "--signal", "B:USR1@60"]  # a minute for the start and some steps
    job, log = submit(folder, environment, "late", options, ["--train.steps", "2000"])
    slurm.wait_until(lambda: log.exists() and "time is over, job" in log.read_text(), log)
    assert "run the same command to continue" in log.read_text()
    slurm.start_again(environment, job, log)
    slurm.wait_until(lambda: "continuing from runs/late/checkpoints/step_" in log.read_text(), log)
    slurm.ask(environment, "scancel", job)
    slurm.wait_until(lambda: slurm.state(environment, job) in ("CANCELLED", "FAILED"), log)
    assert "Traceback" not in log.read_text()
