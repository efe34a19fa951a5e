"""What rank 0 writes while a run goes on: metrics.jsonl and samples.jsonl always, TensorBoard
and W&B when asked."""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_rl.errors import UserError
from megatron_rl.observe.files import move_aside
from megatron_rl.observe.metric_table import metric
from megatron_rl.observe.run_files import METRICS_FILE, SAMPLES_FILE, drop_after, to_json_line

TENSORBOARD_DIR = "tensorboard"
WANDB_ID_FILE = "wandb_id"


class RunWriter:
    """Appends the run's records, one flushed line each. A context manager; one per run, on rank 0.

    Resuming from ``resume_step`` first drops everything written after that step, so that the
    files read as if the run had never stopped. A new run (``resume_step`` None) in a used
    directory moves old files aside to ``<name>.old-N``.
    """

    def __init__(
        self, run_dir: Path, *, tensorboard: bool, wandb: str | None, resume_step: int | None = None
    ) -> None:
        """wandb: project name. UserError: W&B is asked for and not installed, or a file of the
        run cannot be read."""
        #: First step of the configuration in force, written with every record; None: left out.
        self.configuration: int | None = None
        self._run_dir = Path(run_dir)
        self._run_dir.mkdir(parents=True, exist_ok=True)
        wandb_module = _import_wandb() if wandb else None
        last = None
        for name in (METRICS_FILE, SAMPLES_FILE):
            if resume_step is None:
                move_aside(self._run_dir / name)
            else:
                kept = drop_after(self._run_dir / name, resume_step)
                last = kept if name == METRICS_FILE else last
        self._last_step = -1 if last is None else last
        self._metrics_file = (self._run_dir / METRICS_FILE).open("a", encoding="utf-8")
        self._samples_file = (self._run_dir / SAMPLES_FILE).open("a", encoding="utf-8")
        self._tensorboard = self._open_tensorboard(resume_step) if tensorboard else None
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
        for name in metrics:
            metric(name)
        values = {name: float(value) for name, value in metrics.items() if name != "step"}
        if self.configuration is not None:
            values["configuration"] = float(self.configuration)
        self._append(self._metrics_file, {"step": step, **values})
        self._last_step = step
        if self._tensorboard is not None:
            for name, value in values.items():
                self._tensorboard.add_scalar(name, value, global_step=step)
            self._tensorboard.flush()
        if self._wandb is not None:
            self._wandb.log({"step": step, **values})

    def write_samples(self, step: int, samples: Sequence[Mapping[str, Any]]) -> None:
        """Write completions of a step, one object each; the report reads prompt, completion,
        reward and reason."""
        for sample in samples:
            self._append(self._samples_file, {"step": step, **sample})

    def close(self) -> None:
        """Close every file; writing after it is an error."""
        self._metrics_file.close()
        self._samples_file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()

    def __enter__(self) -> RunWriter:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    @staticmethod
    def _append(file: Any, record: Mapping[str, Any]) -> None:
        file.write(to_json_line(record))  # a single write: a reader sees whole lines
        file.flush()

    def _open_tensorboard(self, resume_step: int | None) -> Any:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise UserError(
                "observe.tensorboard is on but TensorBoard is not installed; expected the package "
                "tensorboard; "
                "pip install tensorboard, or set observe.tensorboard to false"
            ) from error
        purge = 0 if resume_step is None else resume_step + 1
        return SummaryWriter(str(self._run_dir / TENSORBOARD_DIR), purge_step=purge)

    def _open_wandb(self, module: Any, project: str, resume_step: int | None) -> Any:
        """A W&B run whose id is kept in the run directory, so that resuming continues the same
        curves."""
        id_file = self._run_dir / WANDB_ID_FILE
        if resume_step is None or not id_file.is_file():
            id_file.write_text(uuid.uuid4().hex[:12], encoding="utf-8")
        run_id = id_file.read_text(encoding="utf-8").strip()
        run = module.init(project=project, id=run_id, dir=str(self._run_dir), resume="allow")
        # W&B refuses an internal step that goes back, as it does on resume; our own step is the
        # axis instead.
        run.define_metric("*", step_metric="step")
        return run


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
