"""Gives the metrics of each step to the loggers of a run, on rank 0. A logger that fails loses its
own output and never ends the run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from megatron_rl.catalogue.blame import blame
from megatron_rl.config.loggers import ChosenLogger
from megatron_rl.errors import UserError


@dataclass(frozen=True)
class LoggedRun:
    """The facts of a run that a logger is made with."""

    directory: Path  #: the run directory; it exists
    resume_step: int | None  #: the run resumes after this step; None: it is new
    config: Mapping[str, Any]  #: the configuration, as in config.yaml; {}: not known
    warn: Callable[[str], None]  #: shows a warning


class Logger(Protocol):
    """What a logger has to have."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Take the metrics of a step, as metrics.jsonl has them (NaN where it has null). Steps
        rise. The last step may come again, with only the metrics that were measured late.
        """

    def close(self) -> None:
        """Called once when the run ends, however it ends."""


class Loggers:
    """The loggers of a run, each in turn."""

    def __init__(self, chosen: Sequence[ChosenLogger], run: LoggedRun) -> None:
        """UserError: a logger cannot be made. OSError: it cannot open a file."""
        self._warn = run.warn
        self._failing: set[str] = set()  #: names of those that raised at the last step
        self._loggers: list[tuple[str, Logger]] = []
        for one in chosen:
            self._loggers.append((one.row.name, _made(one, run)))

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Give a step to each logger. A logger that raises gets the next step too. The run warns
        once when it begins to fail, and once when it works again.
        """
        for name, logger in self._loggers:
            try:
                with blame(f"the logger {name!r}", "metrics.jsonl has every step; the run goes on"):
                    logger.log(step, dict(metrics))
            except UserError as error:
                if name not in self._failing:
                    self._warn(f"at step {step} {error}")
                self._failing.add(name)
            else:
                if name in self._failing:
                    self._warn(f"the logger {name!r} takes steps again, from step {step} on")
                self._failing.discard(name)

    def close(self) -> None:
        """Close each logger; warn of one that raises."""
        for name, logger in self._loggers:
            try:
                with blame(f"the logger {name!r}, closed,", "metrics.jsonl has every step"):
                    logger.close()
            except UserError as error:
                self._warn(str(error))


def _made(chosen: ChosenLogger, run: LoggedRun) -> Logger:
    row = chosen.row
    if row.own is None:
        return row.bind(chosen.settings)(run)
    who, remedy = f"the logger {row.name!r}", "correct it, or leave it out of observe.loggers"
    with blame(f"{who}, made for {run.directory},", remedy):
        logger = row.bind(chosen.settings)(run)
    for method in ("log", "close"):
        if not callable(getattr(logger, method, None)):
            raise UserError(
                f"{who} makes an object of type {type(logger).__name__} without {method}; expected "
                f"one with log(step, metrics) and close(); {remedy}"
            )
    return logger
