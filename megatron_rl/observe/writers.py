"""What rank 0 writes while a run goes on: metrics.jsonl and samples.jsonl always, TensorBoard
and W&B when asked."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_rl.errors import UserError
from megatron_rl.files import move_aside, reason, write_whole
from megatron_rl.observe.append_file import AppendFile
from megatron_rl.observe.metric_table import metric
from megatron_rl.observe.run_files import (
    METRICS_FILE,
    SAMPLES_FILE,
    drop_after,
    read_jsonl,
    to_json_line,
)
from megatron_rl.observe.tensorboard_file import new_event_file, scalars

TENSORBOARD_DIR = "tensorboard"
WANDB_ID_FILE = "wandb_id"


class RunWriter:
    """Appends the run's records, one line each. A context manager; one per run, on rank 0.

    Resuming from ``resume_step`` first drops everything written after that step, so that the
    files read as if the run had never stopped. A new run (``resume_step`` None) in a used
    directory moves old files aside to ``<name>.old-N``.

    Once open, a disk that is full or gone ends nothing: what cannot be written is said once, kept
    in memory (`append_file.MOST_WAITING` bytes a file), and written when there is room.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        tensorboard: bool,
        wandb: str | None,
        resume_step: int | None = None,
        warn: Callable[[str], None],
    ) -> None:
        """wandb: project name. warn: tells a person. UserError: W&B is asked for and not
        installed, or a file of the run cannot be read. OSError: one cannot be written."""
        #: First step of the configuration in force, written with every record; None: left out.
        self.configuration: int | None = None
        self._run_dir, self._warn = Path(run_dir), warn
        self._run_dir.mkdir(parents=True, exist_ok=True)
        self._failing: set[str] = set()  #: files that could not be written when last tried
        wandb_module = _import_wandb() if wandb else None
        last: dict[str, int | None] = {}  #: step in each file
        for name in (METRICS_FILE, SAMPLES_FILE):
            if resume_step is None:
                move_aside(self._run_dir / name)
            else:
                last[name] = drop_after(self._run_dir / name, resume_step)
        kept = last.get(METRICS_FILE)
        self._last_step = -1 if kept is None else kept
        self._last_sampled = last.get(SAMPLES_FILE)
        self._metrics = AppendFile(self._run_dir / METRICS_FILE)
        self._samples = AppendFile(self._run_dir / SAMPLES_FILE)
        self._tensorboard = None
        if tensorboard:
            purge = 0 if resume_step is None else resume_step + 1
            self._tensorboard, failure = new_event_file(self._run_dir / TENSORBOARD_DIR, purge)
            self._report(self._tensorboard, failure)
        self._wandb = self._open_wandb(wandb_module, wandb, resume_step) if wandb else None

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
        self._append(self._metrics, _line({"step": step, **values}))
        self._last_step = step
        self._show(step, values)

    def add_to_last(
        self, step: int, metrics: Mapping[str, float], samples: Sequence[Mapping[str, Any]]
    ) -> None:
        """Put metrics that came late into the object of the last step: the file is replaced. The
        samples are written where the step has none.

        ValueError: it is not the last step, or a name is not in the metric table.
        """
        if step != self._last_step:
            raise ValueError(f"step {step} with {self._last_step} the last; expected the last")
        values = _checked(metrics)
        path = self._metrics.path
        *before, last = read_jsonl(path)
        try:
            write_whole(path, "".join(map(to_json_line, [*before, {**last, **values}])))
            self._metrics.close()
            self._metrics = AppendFile(path)
        except OSError as error:
            self._report(self._metrics, error)
        self._show(step, values)
        if self._last_sampled != step:
            self.write_samples(step, samples)

    def write_samples(self, step: int, samples: Sequence[Mapping[str, Any]]) -> None:
        """Write completions of a step, one object each; the report reads prompt, completion,
        reward and reason."""
        self._append(self._samples, *(_line({"step": step, **sample}) for sample in samples))

    def close(self) -> None:
        """Write what waits for room, if there is some by now, and close every file; writing after
        it is an error."""
        for file in self._files():
            failure = file.close()
            lost = file.waiting + file.lost
            if lost:
                records = f"{lost} record{'' if lost == 1 else 's'}"
                self._warn(f"{records} of {file.path} could not be written and are lost")
            elif failure is not None:
                self._warn(f"{file.path} may lack its last records ({reason(failure)})")
        if self._wandb is not None:
            self._wandb.finish()

    def __enter__(self) -> RunWriter:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _files(self) -> list[AppendFile]:
        files = [self._metrics, self._samples, self._tensorboard]
        return [file for file in files if file is not None]

    def _show(self, step: int, values: Mapping[str, float]) -> None:
        """The same numbers for TensorBoard and W&B."""
        if self._tensorboard is not None:
            self._append(self._tensorboard, scalars(step, values))
        if self._wandb is not None:
            self._wandb.log({"step": step, **values})

    def _append(self, file: AppendFile, *records: bytes) -> None:
        self._report(file, file.append(*records))

    def _report(self, file: AppendFile, failure: OSError | None) -> None:
        """Say it when a file cannot be written any more, and when it can again."""
        name = file.path.name
        if failure is not None and name not in self._failing:
            self._failing.add(name)
            self._warn(
                f"{file.path} could not be written ({reason(failure)}); what is missing is kept "
                "in memory and tried again with every step; make room"
            )
        elif failure is None and name in self._failing:
            self._failing.discard(name)
            lost = f", {file.lost} old records are lost" if file.lost else ""
            self._warn(f"{file.path} is written again{lost}")

    def _open_wandb(self, module: Any, project: str, resume_step: int | None) -> Any:
        """A W&B run whose id is kept in the run directory, so that resuming continues the same
        curves."""
        id_file = self._run_dir / WANDB_ID_FILE
        if resume_step is None or not id_file.is_file():
            write_whole(id_file, uuid.uuid4().hex[:12])
        run_id = id_file.read_text(encoding="utf-8").strip()
        run = module.init(project=project, id=run_id, dir=str(self._run_dir), resume="allow")
        # W&B refuses an internal step that goes back, as it does on resume; our own step is the
        # axis instead.
        run.define_metric("*", step_metric="step")
        return run


def _checked(metrics: Mapping[str, float]) -> dict[str, float]:
    """The metrics as floats, without the step. ValueError: one is not in the metric table."""
    for name in metrics:
        metric(name)
    return {name: float(value) for name, value in metrics.items() if name != "step"}


def _line(record: Mapping[str, Any]) -> bytes:
    return to_json_line(record).encode("utf-8")


def _import_wandb() -> Any:
    try:
        import wandb
    except ImportError as error:
        raise UserError(
            "observe.wandb is set but Weights & Biases is not installed; expected the package "
            "wandb; "
            "pip install wandb, or remove observe.wandb"
        ) from error
    return wandb
