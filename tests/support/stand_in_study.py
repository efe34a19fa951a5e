"""A study whose runs are stand-ins: processes that write a run's files without a model.

    python tests/support/stand_in_study.py STUDY.yaml [--quick ...]      # as ``megatron-rl study``
    python tests/support/stand_in_study.py serve DESCRIPTOR              # is copied for stand-ins

A stand-in holds the run's lock, adds a record to metrics.jsonl every few milliseconds, resumes
after its last one, and stops after a step when SIGTERM comes, as runs do. Each step is also noted
in ``journal``, in the current directory, so that a test sees every step of every process. What an
arm's stand-in does beyond that is in its name: ``fails``, ``fails_once``, ``diverges``, ``slow``.
"""

from __future__ import annotations

import functools
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parents[2]
STEP_S = 0.02

BASE = """\
data: {tokenizer: {path: tokenizer.model}, train: train.jsonl}
train: {steps: 6}
"""


def lay_out(folder: Path, study: str) -> None:
    """The files of a study in a directory, where its commands run."""
    (folder / "base.yaml").write_text(BASE)
    (folder / "study.yaml").write_text(f"study_dir: out\nbase: base.yaml\n{study}")
    for name in ("tokenizer.model", "train.jsonl"):
        (folder / name).touch()


def value(arm: str, seed: int, step: int) -> float:
    """reward/solved of a stand-in: what a test can work out by hand."""
    return {"a": 0.1, "b": 0.2}.get(arm, 0.3) + 0.01 * seed + 0.05 * step


def journal(folder: Path) -> list[tuple[str, int, int]]:
    """(run, process, step) of each step in the order of time; step -1: the process began."""
    text = (folder / "journal").read_text() if (folder / "journal").exists() else ""
    return [(run, int(pid), int(step)) for run, pid, step in map(str.split, text.splitlines())]


def command(run: Any) -> list[str]:
    """A stand-in's command, for a run of a plan."""
    about = [str(run.run_dir), run.arm, str(run.seed or 0), str(run.steps)]
    return [sys.executable, __file__, "stand-in", *about]


def fork_server(note: Callable[[str], None]) -> Any:
    """A study's fork server, whose copies are stand-ins."""
    from megatron_rl.study.forked import ForkServer

    program = [sys.executable, __file__]
    return ForkServer(note, program, [*program, "serve"])


def _main(words: Sequence[str]) -> int:
    """A stand-in, from its arguments."""
    _stand_in(Path(words[1]), words[2], int(words[3]), int(words[4]))
    return 0


def _stand_in(run_dir: Path, arm: str, seed: int, steps: int) -> None:
    from megatron_rl.run.run_lock import RunLock

    asked: list[int] = []
    lock = RunLock(run_dir)
    lock.acquire()
    signal.signal(signal.SIGTERM, lambda number, frame: asked.append(number))
    metrics = run_dir / "metrics.jsonl"
    lines = metrics.read_bytes().splitlines(keepends=True) if metrics.exists() else []
    whole = [line for line in lines if line.endswith(b"\n")]
    metrics.write_bytes(b"".join(whole))
    _note(run_dir, -1)
    for step in range(len(whole) + 1, steps + 1):
        time.sleep(STEP_S * (20 if arm == "slow" else 1))
        _misbehave(run_dir, arm, step)
        record = {"step": step, "loss": 0.5, "reward/solved": value(arm, seed, step)}
        with metrics.open("a") as file:
            file.write(json.dumps({**record, "time/step_s": STEP_S}) + "\n")
        _note(run_dir, step)
        if asked:
            break
    lock.release()


def _misbehave(run_dir: Path, arm: str, step: int) -> None:
    once = run_dir / "has_failed"
    if step == 3 and (arm == "fails" or (arm == "fails_once" and not once.exists())):
        once.touch()
        sys.exit("a line before\nmegatron-rl: error: the disk is odd; expected an even one")
    if step == 3 and arm == "diverges":
        lost = "the weights in memory are lost, the last checkpoint is not"
        sys.exit(f"megatron-rl: error: the gradient norm is nan (rank 0); {lost}")


def _note(run_dir: Path, step: int) -> None:
    line = f"{run_dir} {os.getpid()} {step}\n".encode()
    file = os.open("journal", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    os.write(file, line)
    os.close(file)


def overlaps(steps: list[tuple[str, int, int]]) -> Iterator[str]:
    """Runs in which two processes took turns: an earlier one wrote after a later one had begun."""
    owner: dict[str, int] = {}
    for run, pid, step in steps:
        if step == -1:
            owner[run] = pid
        elif owner[run] != pid:
            yield run


def study(words: list[str]) -> int:
    """``megatron-rl study WORDS`` in this process, its runs stand-ins; the exit code."""
    from megatron_rl.cli import main
    from megatron_rl.study import command as verb

    with_stand_ins = functools.partial(verb.run_study, make_command=command, make_forks=fork_server)
    with mock.patch.object(verb, "run_study", with_stand_ins):
        return main(["study", *words])


if __name__ == "__main__":
    sys.path[0] = str(ROOT)
    if sys.argv[1] == "stand-in":
        _main(sys.argv[1:])
    elif sys.argv[1] == "serve":
        from megatron_rl.study.fork_server import serve

        serve(int(sys.argv[2]), lambda: False, _main)
    else:
        sys.exit(study(sys.argv[1:]))
