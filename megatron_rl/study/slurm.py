"""A study as a Slurm job array: a task a run, each the same command with ``--only INDEX``."""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_rl.errors import RunFailed
from megatron_rl.files import write_whole
from megatron_rl.study.plan import Plan
from megatron_rl.study.state import state_of

JOB_FILE = "study.sbatch"

#: A task that is preempted, or at its time limit, ends after a checkpoint and is queued again.
_JOB = """\
#!/usr/bin/env bash
# A run of a study, by its index: sbatch --array=INDEXES {file}
#SBATCH --job-name {name}
#SBATCH --ntasks 1
#SBATCH --cpus-per-task {cores}
#SBATCH --requeue
#SBATCH --signal B:USR1@120
#SBATCH --output {logs}/%a.log
#SBATCH --open-mode append
{options}set -uo pipefail
cd {here}
{setup}{command} --only "$SLURM_ARRAY_TASK_ID" &
run=$! time_is_over=
trap 'time_is_over=1; kill -TERM "$run"' USR1
trap 'kill -TERM "$run"' TERM
wait "$run"
code=$?
while kill -0 "$run" 2>/dev/null; do # a signal ends a wait, not the run
    wait "$run"
    code=$?
done
if [ -n "$time_is_over" ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
"""


def write_job(plan: Plan, words: Sequence[str]) -> Path:
    """Write the batch file. ``words``: the study's command line after ``megatron-rl``, without
    ``--launch``. OSError: it cannot be written.
    """
    study = plan.study
    logs = plan.folder / "slurm"
    logs.mkdir(parents=True, exist_ok=True)
    ranks = max(run.ranks for run in plan.runs)
    path = plan.folder / JOB_FILE
    text = _JOB.format(
        file=shlex.quote(str(path)),
        name=study.study_dir.name,
        cores=ranks * study.threads,
        logs=logs,
        options="".join(f"#SBATCH {option}\n" for option in study.slurm.options),
        here=shlex.quote(str(Path.cwd())),
        setup="".join(f"{line}\n" for line in study.slurm.setup),
        command=shlex.join([sys.executable, "-m", "megatron_rl", *words]),
    )
    write_whole(path, text)
    return path


def submissions(plan: Plan, path: Path, at_once: int | None) -> list[list[str]]:
    """The sbatch commands of the runs that are left: first the prepared ones, then the arms, which
    wait for those (``{job}`` stands for the number of the first job).
    """
    limit = at_once or plan.study.at_once
    commands: list[list[str]] = []
    for prepared in (True, False):
        left = [
            run.index
            for run in plan.runs
            if run.prepared is prepared
            and state_of(run).kind not in ("done", "not finite", "running")
        ]
        if left:
            array = ranges(left) + (f"%{limit}" if limit else "")
            wait = ["--dependency=afterok:{job}"] if commands else []
            commands.append(["sbatch", "--parsable", *wait, f"--array={array}", str(path)])
    return commands


def ranges(numbers: Sequence[int]) -> str:
    """``0-2,5`` of 0, 1, 2, 5."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in parts)


def submit(plan: Plan, words: Sequence[str], at_once: int | None) -> list[str]:
    """Write the batch file and submit it, if there is sbatch; lines that say what was done.

    Raises:
        RunFailed: sbatch refuses. OSError: the file cannot be written.
    """
    path = write_job(plan, words)
    commands = submissions(plan, path, at_once)
    if not commands:
        return ["every run has ended or is at work: nothing to submit"]
    if shutil.which("sbatch") is None:
        shown = [" ".join(command) for command in commands]
        return [f"{path} is written; there is no sbatch here: submit it where there is", *shown]
    lines, job = [], ""
    for command in commands:
        ready = [word.replace("{job}", job) for word in command]
        done = subprocess.run(ready, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            said = " ".join(done.stderr.split())
            raise RunFailed(f"sbatch refuses {path}: {said}; correct slurm.options, and try again")
        job = done.stdout.strip().partition(";")[0]
        lines.append(f"job {job}: {' '.join(ready)}")
    return lines
