"""Metrics to Weights & Biases."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from typing import Any

from megatron_rl.catalogue.blame import blame
from megatron_rl.catalogue.loggers import WandbSettings
from megatron_rl.errors import UserError
from megatron_rl.files import write_whole
from megatron_rl.observe.loggers import LoggedRun

ID_FILE = "wandb_id"


class WandB:
    """A W&B run whose id is kept in the run directory, so that resuming continues the same
    curves.
    """

    def __init__(self, run: LoggedRun, settings: WandbSettings) -> None:
        """UserError: W&B is not installed, or does not begin a run."""
        module = _import_wandb()
        id_file = run.directory / ID_FILE
        if run.resume_step is None or not id_file.is_file():
            write_whole(id_file, uuid.uuid4().hex[:12])
        run_id = id_file.read_text(encoding="utf-8").strip()
        with blame("the logger 'wandb'", "see to the connection and the key, or leave it out"):
            self._run = module.init(
                project=settings.project, id=run_id, dir=str(run.directory), resume="allow"
            )
            # W&B refuses an internal step that goes back, as it does on resume; our own step is the
            # axis instead.
            self._run.define_metric("*", step_metric="step")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """See `loggers.Logger`."""
        self._run.log({"step": step, **metrics})

    def close(self) -> None:
        """See `loggers.Logger`."""
        self._run.finish()


def _import_wandb() -> Any:
    try:
        import wandb
    except ImportError as error:
        raise UserError(
            "the logger wandb is on (observe.wandb, observe.loggers) but Weights & Biases "
            "is not installed; expected the package wandb; pip install wandb, or leave it out"
        ) from error
    return wandb
