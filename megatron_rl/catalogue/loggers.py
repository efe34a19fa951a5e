"""The loggers with their settings. To ship one: a row here, and its class in ``observe/``."""

from __future__ import annotations

from pydantic import Field

from megatron_rl.catalogue.entry import LoggerEntry
from megatron_rl.catalogue.settings import Settings


class WandbSettings(Settings):
    """Settings of the logger wandb."""

    project: str = Field(min_length=1)
    """Weights & Biases project; observe.wandb sets it too."""


LOGGERS: tuple[LoggerEntry, ...] = (
    LoggerEntry(
        name="tensorboard",
        summary="TensorBoard events in the run directory, tensorboard/; observe.tensorboard too",
        code="megatron_rl.observe.tensorboard_file:TensorBoard",
    ),
    LoggerEntry(
        name="wandb",
        summary="a Weights & Biases run, which resuming continues; needs the extra wandb",
        code="megatron_rl.observe.wandb_run:WandB",
        settings=WandbSettings,
    ),
)
