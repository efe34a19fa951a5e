"""The section ``observe``."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from megatron_rl.config.section import Section


class LoggerConfig(Section):
    """A logger; the name alone means a logger without settings."""

    name: str
    """The logger: a name of `megatron-rl list loggers`, or one of your own, ./my.py:MyLogger."""
    settings: dict[str, Any] = {}
    """Settings of the logger that differ from its defaults."""

    @model_validator(mode="before")
    @classmethod
    def a_name_is_enough(cls, given: Any) -> Any:
        """Accept ``tensorboard`` for ``{name: tensorboard}``."""
        return {"name": given} if isinstance(given, str) else given


class ObserveConfig(Section):
    """The display, and the files and loggers of metrics."""

    console: Literal["auto", "rich", "plain"] = "auto"
    """auto: a progress display on a terminal, plain lines otherwise."""
    samples: int = Field(4, ge=0)
    """Completions a step written to samples.jsonl."""
    tokens: int = Field(512, ge=0)
    """Tokens of each of these completions that are written with their ratio and gamma, from the
    first; 0: none."""
    tensorboard: bool = True
    """Write TensorBoard events into the run directory: the logger tensorboard."""
    wandb: str | None = None
    """Weights & Biases project; needs the extra `wandb`: the logger wandb."""
    loggers: tuple[LoggerConfig, ...] = ()
    """More loggers, which get the metrics of every step; metrics.jsonl is always written."""
