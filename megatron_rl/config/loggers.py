"""The loggers that the section ``observe`` names, with their settings."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_rl.catalogue.entry import LoggerEntry
from megatron_rl.catalogue.find import find
from megatron_rl.catalogue.kinds import LOGGERS
from megatron_rl.catalogue.read import read_settings
from megatron_rl.catalogue.settings import Settings
from megatron_rl.config.schema_observe import LoggerConfig, ObserveConfig
from megatron_rl.errors import UserError


@dataclass(frozen=True)
class ChosenLogger:
    """A logger of a run."""

    row: LoggerEntry
    settings: Settings | None


def chosen_loggers(observe: ObserveConfig) -> tuple[ChosenLogger, ...]:
    """The loggers of ``tensorboard`` and ``wandb``, then those of ``loggers``.

    Raises:
        UserError: an unknown name, a mistake in the settings, a logger named twice.
    """
    given = list(observe.loggers)
    places = [f"observe.loggers.{number}" for number in range(len(given))]
    if observe.wandb is not None:
        given.insert(0, LoggerConfig(name="wandb", settings={"project": observe.wandb}))
        places.insert(0, "observe.wandb")
    # It is on by default, so naming it as well is no mistake.
    if observe.tensorboard and all(one.name != "tensorboard" for one in given):
        given.insert(0, LoggerConfig(name="tensorboard"))
        places.insert(0, "observe.tensorboard")
    names = [one.name for one in given]
    for number, name in enumerate(names):
        if name in names[:number]:
            raise UserError(
                f"{places[number]} is {name}, as {places[names.index(name)]} is; expected each "
                "logger once; remove one"
            )
    return tuple(_chosen(place, one) for place, one in zip(places, given, strict=True))


def _chosen(place: str, given: LoggerConfig) -> ChosenLogger:
    row = find(LOGGERS, given.name, f"{place}.name")
    of = f"the logger {given.name}"
    return ChosenLogger(row, read_settings(f"{place}.settings", of, row.settings, given.settings))
