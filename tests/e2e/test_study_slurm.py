"""A study as a job array on a real Slurm of two nodes on this machine, its runs stand-ins."""

import subprocess
import sys
from pathlib import Path

import pytest

from megatron_rl.cli import main
from megatron_rl.study.plan import make_plan
from megatron_rl.study.schema import read_study
from megatron_rl.study.state import state_of
from tests.support import slurm, stand_in_study
from tests.support.runs import ROOT

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(slurm.missing() is not None, reason=str(slurm.missing())),
]
STUDY = """\
prepare: {warm: {config: base.yaml}}
start_from: warm
arms: {a: {optimizer.lr: 0.1}, slow: {optimizer.lr: 0.2}}
seeds: 2
overrides: {train.steps: 12}
"""


@pytest.fixture
def environment(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    stand_in_study.lay_out(tmp_path, STUDY)
    with slurm.cluster(tmp_path / "cluster") as environment:
        yield environment


def submit(folder, environment, capsys, monkeypatch, *options):
    """The jobs of what the verb writes, with the stand-ins' command in the place of the runs'."""
    with monkeypatch.context() as without:
        without.setenv("PATH", "")
        assert main(["study", "study.yaml", "--launch", "slurm"]) == 0
    commands = capsys.readouterr().out.splitlines()[1:]
    path = folder / "out" / "study.sbatch"
    script = ROOT / "tests" / "support" / "stand_in_study.py"
    command = f"{sys.executable} -m megatron_rl study"
    assert command in path.read_text()
    path.write_text(path.read_text().replace(command, f"{sys.executable} {script}"))
    jobs = []
    for words in map(str.split, commands):
        words[1:1] = options
        ready = [word.replace("{job}", jobs[-1] if jobs else "") for word in words]
        done = subprocess.run(ready, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        jobs.append(done.stdout.strip())
    return jobs


def kinds():
    return {run.name: state_of(run).kind for run in make_plan(read_study(Path("study.yaml"))).runs}


def steps(folder, name):
    runs = {run.name: run for run in make_plan(read_study(Path("study.yaml"))).runs}
    noted = stand_in_study.journal(folder)
    return [step for run, _, step in noted if run == str(runs[name].run_dir) and step > 0]


def test_every_run_is_a_task_and_a_requeued_one_goes_on(tmp_path, environment, capsys, monkeypatch):
    _, arms = submit(tmp_path, environment, capsys, monkeypatch)
    log = tmp_path / "out" / "slurm" / "2.log"  # of slow, seed 1
    slurm.wait_until(lambda: len(steps(tmp_path, "slow seed 1")) > 1, log)
    slurm.ask(environment, "scontrol", "requeue", f"{arms}_2")
    slurm.wait_until(lambda: kinds()["slow seed 1"] == "stopped", log)
    slurm.start_again(environment, f"{arms}_2", log)
    slurm.wait_until(lambda: set(kinds().values()) == {"done"}, log)
    assert "slow seed 1: goes on" in log.read_text()
    for name in kinds():
        last = 6 if name == "prepare warm" else 12
        assert steps(tmp_path, name) == list(range(1, last + 1))
    assert list(stand_in_study.overlaps(stand_in_study.journal(tmp_path))) == []


def test_a_task_whose_time_is_over_is_queued_again(tmp_path, environment, capsys, monkeypatch):
    text = (tmp_path / "study.yaml").read_text()
    (tmp_path / "study.yaml").write_text(text.replace("steps: 12", "steps: 100000"))
    options = ["--time=2", "--signal=B:USR1@90"]  # half a minute for some steps
    _, arms = submit(tmp_path, environment, capsys, monkeypatch, *options)
    log = tmp_path / "out" / "slurm" / "2.log"
    slurm.wait_until(lambda: len(steps(tmp_path, "slow seed 1")) > 1, log)
    slurm.wait_until(lambda: slurm.state(environment, f"{arms}_2") == "PENDING", log)
    before = steps(tmp_path, "slow seed 1")
    assert kinds()["slow seed 1"] == "stopped"
    slurm.start_again(environment, f"{arms}_2", log)
    slurm.wait_until(lambda: len(steps(tmp_path, "slow seed 1")) > len(before), log)
    assert steps(tmp_path, "slow seed 1")[: len(before) + 1] == list(range(1, len(before) + 2))
    slurm.ask(environment, "scancel", arms)
    ended = ("CANCELLED", "COMPLETED", "FAILED")
    slurm.wait_until(lambda: slurm.state(environment, f"{arms}_2") in ended, log)
