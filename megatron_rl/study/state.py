"""What is known of a planned run from its directory: whether it is done, goes on, or has failed.

RUN_DIR/planned.yaml    the resolved configuration, as the study gives it to the run
RUN_DIR/log.txt         what the run's processes have shown
RUN_DIR/done.json       written last, when the run has ended for good
RUN_DIR/failed.json     its last error; removed when it is started again
"""

from __future__ import annotations

import functools
import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megatron_rl.config.json_text import BadJson, parse_json
from megatron_rl.config.load import dump_config
from megatron_rl.files import read_bounded, write_whole
from megatron_rl.observe.metric_table import with_new_names
from megatron_rl.observe.run_files import EVALUATED, METRICS_FILE
from megatron_rl.run.run_lock import owner_in
from megatron_rl.study.plan import PlannedRun

PLANNED_FILE = "planned.yaml"
LOG_FILE = "log.txt"
DONE_FILE = "done.json"
FAILED_FILE = "failed.json"
_MOST_BYTES = 100_000
#: Bytes from the end of metrics.jsonl that hold its last records, and of a log its last error.
_TAIL = 1 << 18
#: In every message of a run that ends because a number is not finite (policy/finite_checks.py).
NOT_FINITE = "the weights in memory are lost"

Kind = Literal["done", "not finite", "running", "failed", "stopped", "waiting"]
#: Ended for good: not started again.
FINISHED = ("done", "not finite")


@dataclass(frozen=True)
class State:
    """How far a run is."""

    kind: Kind
    step: int = 0  #: last step in its metrics
    record: Mapping[str, Any] | None = None  #: of that step, or the newest with metrics of a step
    step_seconds: float | None = None  #: a step's, mean over the last ones
    text: str = ""  #: the error of a failed run; the process of a running one

    @property
    def finished(self) -> bool:
        """Whether it is not started again."""
        return self.kind in FINISHED


def state_of(run: PlannedRun) -> State:
    """The state of a run, from its files; also while it goes on, and from another process."""
    records = last_records(run.run_dir / METRICS_FILE)
    step = records[-1]["step"] if records else 0
    seconds = [record["time/step_s"] for record in records if record.get("time/step_s")]
    mean = sum(seconds) / len(seconds) if seconds else None
    last = next((record for record in reversed(records) if "loss" in record), None)
    last = last or (records[-1] if records else None)

    def state(kind: Kind, text: str = "") -> State:
        return State(kind, step, last, mean, text)

    done = _read(run, DONE_FILE)
    if done is not None:
        kind: Kind = "not finite" if done.get("outcome") == "not finite" else "done"
        return state(kind, str(done.get("error", "")))
    owner = owner_in(run.run_dir)
    if owner is not None:
        return state("running", f"process {owner.pid} on {owner.host}")
    failed = _read(run, FAILED_FILE)
    if failed is not None:
        return state("failed", str(failed.get("error", "")))
    return state("stopped" if records else "waiting")


def is_complete(run: PlannedRun) -> bool:
    """Whether the metrics hold the run's last step, with its evaluation if there is one."""
    records = last_records(run.run_dir / METRICS_FILE)
    last = records[-1] if records else {"step": -1}
    evaluated = run.config.data.eval is None or EVALUATED in last
    return last["step"] == run.steps and evaluated


def lay_out(run: PlannedRun) -> None:
    """Make the run's directory with its configuration; forget an earlier failure. OSError."""
    run.run_dir.mkdir(parents=True, exist_ok=True)
    write_whole(run.run_dir / PLANNED_FILE, dump_config(run.config))
    (run.run_dir / FAILED_FILE).unlink(missing_ok=True)


def mark_done(run: PlannedRun, outcome: str = "done", error: str = "") -> None:
    """Write the last file of a run that has ended for good. OSError."""
    ended = time.strftime("%Y-%m-%d %H:%M:%S %Z")
    _write(run, DONE_FILE, {"outcome": outcome, "error": error, "ended": ended})


def mark_failed(run: PlannedRun, error: str) -> None:
    """Write down why a run failed. OSError."""
    _write(run, FAILED_FILE, {"error": error})


def last_error(log: Path, code: int, start: int = 0) -> str:
    """The line that says why a run failed: its last error line, else the last line of its log,
    else its exit code or signal. ``start``: the byte of the log where it began.
    """
    if code < 0:
        return f"ended by signal {-code}"
    lines = [line.strip() for line in _tail(log, start).decode(errors="replace").splitlines()]
    lines = [line for line in lines if line]
    errors = [line for line in lines if "megatron-rl: error: " in line]
    if errors:
        return errors[-1].partition("megatron-rl: error: ")[2]
    traceback = [line for line in lines if line.partition(":")[0].endswith(("Error", "Exception"))]
    return (traceback or lines or [f"exit code {code}"])[-1]


def last_records(path: Path) -> list[dict[str, Any]]:
    """The last objects of a JSONL file, without a torn last line; [] of a missing one."""
    try:
        status = path.stat()
    except OSError:
        return []
    return list(_records_of(path, status.st_mtime_ns, status.st_size))


@functools.lru_cache(maxsize=1024)
def _records_of(path: Path, changed: int, size: int) -> tuple[dict[str, Any], ...]:
    """They are read again only if the file has changed: a person looks every second."""
    lines = _tail(path).split(b"\n")
    lines = lines[1:] if size > _TAIL else lines  # the first may be torn
    records = []
    for line in lines:
        try:
            record = parse_json(line)
        except BadJson:
            continue
        if isinstance(record, dict) and type(record.get("step")) is int:
            records.append(with_new_names(record))
    return tuple(records)


def _tail(path: Path, start: int = 0) -> bytes:
    try:
        with open(path, "rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(start, file.tell() - _TAIL))
            return file.read(_TAIL)
    except OSError:
        return b""


def _read(run: PlannedRun, name: str) -> dict[str, Any] | None:
    """A marker, if it is of this very configuration."""
    try:
        found = parse_json(read_bounded(run.run_dir / name, _MOST_BYTES))
    except (OSError, BadJson):
        return None
    return found if isinstance(found, dict) and found.get("digest") == run.digest else None


def _write(run: PlannedRun, name: str, values: Mapping[str, Any]) -> None:
    about = {"arm": run.arm, "seed": run.seed, "digest": run.digest}
    write_whole(run.run_dir / name, json.dumps({**about, **values}, indent=1) + "\n")
