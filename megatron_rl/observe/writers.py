"""Rank 0 writes metrics.jsonl and samples.jsonl during a run, and gives the loggers the metrics."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_rl.config.loggers import ChosenLogger
from megatron_rl.files import move_aside, write_whole
from megatron_rl.observe.append_file import WarningFile
from megatron_rl.observe.loggers import LoggedRun, Loggers
from megatron_rl.observe.metric_table import metric, with_old_names
from megatron_rl.observe.run_files import (
    METRICS_FILE,
    SAMPLES_FILE,
    drop_after,
    read_jsonl,
    to_json_line,
)


class RunWriter:
    """Appends the run's records, one line each. A context manager; one per run, on rank 0.

    Resuming from ``resume_step`` first drops everything written after that step, so that the
    files read as if the run had never stopped. A new run (``resume_step`` None) in a used
    directory moves old files aside to ``<name>.old-N``.

    Once it is open, a full or lost disk does not end the run. The writer warns once, keeps the
    records in memory (`append_file.MOST_WAITING` bytes a file), and writes them when there is room.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        loggers: Sequence[ChosenLogger] = (),
        config: Mapping[str, Any] | None = None,
        resume_step: int | None = None,
        warn: Callable[[str], None],
    ) -> None:
        """loggers: get the content of metrics.jsonl. config: for them. warn: shows a warning.
        UserError: a logger cannot be made, or a file of the run cannot be read. OSError: one
        cannot be written."""
        #: First step of the configuration in force, written with every record; None: left out.
        self.configuration: int | None = None
        self._run_dir = Path(run_dir)
        self._run_dir.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as undo:
            # Loggers first: if one is refused, no file has been moved or cut.
            run = LoggedRun(self._run_dir, resume_step, config or {}, warn)
            self._loggers = Loggers(loggers, run)
            undo.callback(self._loggers.close)
            last: dict[str, int | None] = {}  # step in each file
            for name in (METRICS_FILE, SAMPLES_FILE):
                if resume_step is None:
                    move_aside(self._run_dir / name)
                else:
                    last[name] = drop_after(self._run_dir / name, resume_step)
            self._metrics = WarningFile(self._run_dir / METRICS_FILE, warn)
            self._samples = WarningFile(self._run_dir / SAMPLES_FILE, warn)
            undo.pop_all()
        kept = last.get(METRICS_FILE)
        self._last_step = -1 if kept is None else kept
        self._last_sampled = last.get(SAMPLES_FILE)

    def write_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write the one object of a step, evaluation included; NaN and infinities as null.

        ValueError: the step is not above the last one written, or a name is not in the metric
        table.
        """
        if step <= self._last_step:
            raise ValueError(
                f"step {step} after step {self._last_step}; expected one record a step, in order"
            )
        values = _checked(metrics)
        if self.configuration is not None:
            values["configuration"] = float(self.configuration)
        self._metrics.write(_line({"step": step, **values}))
        self._last_step = step
        self._loggers.log(step, values)

    def add_to_last(
        self, step: int, metrics: Mapping[str, float], samples: Sequence[Mapping[str, Any]]
    ) -> None:
        """Add late metrics to the object of the last step; the file is replaced. The samples are
        written only if the step has none.

        ValueError: ``step`` is not the last step, or a name is not in the metric table.
        """
        if step != self._last_step:
            raise ValueError(f"step {step} with {self._last_step} the last; expected the last")
        values = _checked(metrics)
        path = self._metrics.path
        *before, last = read_jsonl(path)
        try:
            write_whole(path, "".join(map(to_json_line, [*before, {**last, **values}])))
            self._metrics.reopen()
        except OSError as error:
            self._metrics.note(error)
        self._loggers.log(step, values)
        if self._last_sampled != step:
            self.write_samples(step, samples)

    def write_samples(self, step: int, samples: Sequence[Mapping[str, Any]]) -> None:
        """Write completions of a step, one object each; the report reads prompt, completion,
        reward and reason."""
        self._samples.write(*(_line({"step": step, **sample}) for sample in samples))

    def close(self) -> None:
        """Write what still waits, if there is room, and close every file. Writing after it is an
        error."""
        self._metrics.finish()
        self._samples.finish()
        self._loggers.close()

    def __enter__(self) -> RunWriter:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def _checked(metrics: Mapping[str, float]) -> dict[str, float]:
    """The metrics as floats, without the step; those that were renamed also under the old name.
    ValueError: the metric table has no such name.
    """
    for name in metrics:
        metric(name)
    return with_old_names({name: float(value) for name, value in metrics.items() if name != "step"})


def _line(record: Mapping[str, Any]) -> bytes:
    return to_json_line(record).encode("utf-8")
