"""The job array of a study: its file, and what is submitted, with a stand-in for sbatch."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_rl.errors import RunFailed
from megatron_rl.study import slurm
from megatron_rl.study.plan import make_plan
from megatron_rl.study.schema import read_study
from megatron_rl.study.state import lay_out as lay_out_run
from megatron_rl.study.state import mark_done
from tests.support.stand_in_study import lay_out

STUDY = """\
prepare: {warm: {config: base.yaml}}
start_from: warm
arms: {a: {}, b: {optimizer.lr: 0.1}}
seeds: 3
threads: 2
slurm: {options: [--partition=gpu], setup: [export FROM_SETUP=1]}
"""
WORDS = ["study", "study.yaml", "--quick"]


@pytest.fixture
def plan(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lay_out(tmp_path, STUDY)
    return make_plan(read_study(Path("study.yaml")))


def done(run):
    lay_out_run(run)
    mark_done(run)


def test_ranges():
    assert slurm.ranges([0, 1, 2, 5, 7, 8]) == "0-2,5,7-8"
    assert slurm.ranges([4]) == "4"


def test_what_is_left_is_submitted_arms_after_their_weights(plan):
    path = slurm.write_job(plan, WORDS)
    first = ["sbatch", "--parsable", "--array=0%2", str(path)]
    wait = ["--dependency=afterok:{job}"]
    second = ["sbatch", "--parsable", *wait, "--array=1-6%2", str(path)]
    assert slurm.submissions(plan, path, 2) == [first, second]
    done(plan.runs[0])
    done(plan.runs[3])
    left = ["sbatch", "--parsable", "--array=1-2,4-6", str(path)]
    assert slurm.submissions(plan, path, None) == [left]


def test_the_batch_file_runs_the_command_of_a_task(plan, tmp_path):
    """Run by bash as a task would be, with an interpreter that shows what it was given."""
    path = slurm.write_job(plan, WORDS)
    text = path.read_text()
    assert "#SBATCH --partition=gpu\n" in text and "#SBATCH --cpus-per-task 2\n" in text
    shown = tmp_path / "python"
    shown.write_text('#!/bin/sh\necho "$PWD $FROM_SETUP $@"\nexit 7\n')
    shown.chmod(0o755)
    path.write_text(text.replace(shlex.quote(sys.executable), str(shown)))
    environment = {**os.environ, "SLURM_ARRAY_TASK_ID": "5", "SLURM_JOB_ID": "1"}
    ran = subprocess.run(
        ["bash", path.resolve()], cwd="/", env=environment, capture_output=True, text=True
    )
    assert ran.returncode == 7, ran.stderr
    assert ran.stdout == f"{tmp_path} 1 -m megatron_rl study study.yaml --quick --only 5\n"


def fake_sbatch(folder, monkeypatch, script):
    folder = folder / "bin"
    folder.mkdir()
    (folder / "sbatch").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


def test_submission_hands_the_first_jobs_number_on(plan, tmp_path, monkeypatch):
    fake_sbatch(tmp_path, monkeypatch, 'echo "$@" >> asked; wc -l < asked')
    lines = slurm.submit(plan, WORDS, None)
    path = "out/study.sbatch"
    assert (tmp_path / "asked").read_text().splitlines() == [
        f"--parsable --array=0 {path}",
        f"--parsable --dependency=afterok:1 --array=1-6 {path}",
    ]
    assert lines[1].startswith("job 2: sbatch --parsable --dependency=afterok:1")
    for run in plan.runs:
        done(run)
    assert slurm.submit(plan, WORDS, None) == [
        "every run has ended or is at work: nothing to submit"
    ]


def test_a_refusal_of_sbatch_is_shown(plan, tmp_path, monkeypatch):
    fake_sbatch(tmp_path, monkeypatch, "echo invalid partition >&2; exit 1")
    with pytest.raises(RunFailed, match="sbatch refuses out/study.sbatch: invalid partition"):
        slurm.submit(plan, WORDS, None)


def test_without_sbatch_the_commands_are_shown(plan, monkeypatch):
    monkeypatch.setenv("PATH", "")
    lines = slurm.submit(plan, WORDS, None)
    assert lines[0].startswith("out/study.sbatch is written; there is no sbatch here")
    assert lines[1] == "sbatch --parsable --array=0 out/study.sbatch"
