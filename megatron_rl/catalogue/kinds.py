"""The kinds of things that a configuration can name, each with its rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Callable, Generic, TypeVar

from megatron_rl.catalogue.advantages import ADVANTAGES as ADVANTAGE_ROWS
from megatron_rl.catalogue.blame import blame
from megatron_rl.catalogue.corrections import CORRECTIONS as CORRECTION_ROWS
from megatron_rl.catalogue.engines import ENGINES as ENGINE_ROWS
from megatron_rl.catalogue.entry import (
    AdvantagesEntry,
    CorrectionEntry,
    EngineEntry,
    Entry,
    EnvironmentEntry,
    LoggerEntry,
    LossEntry,
    OptimizerEntry,
    SourceEntry,
    VerifierEntry,
)
from megatron_rl.catalogue.environments import ENVIRONMENTS as ENVIRONMENT_ROWS
from megatron_rl.catalogue.families import FAMILIES as FAMILY_ROWS
from megatron_rl.catalogue.families import FamilyEntry
from megatron_rl.catalogue.loggers import LOGGERS as LOGGER_ROWS
from megatron_rl.catalogue.losses import LOSSES as LOSS_ROWS
from megatron_rl.catalogue.optimizers import OPTIMIZERS as OPTIMIZER_ROWS
from megatron_rl.catalogue.settings import Settings
from megatron_rl.catalogue.sources import SOURCES as SOURCE_ROWS
from megatron_rl.catalogue.verifiers import VERIFIERS as VERIFIER_ROWS
from megatron_rl.families.common.family import Family

Row = TypeVar("Row", bound=Entry)


@dataclass(frozen=True)
class Kind(Generic[Row]):
    """A kind of thing."""

    noun: str  #: "the NOUN grpo"
    field: str  #: the configuration key that names one
    row: type[Row]
    rows: tuple[Row, ...]
    arguments: tuple[str, ...]  #: arguments of the function, without its settings
    decorator: str  #: an example decorator for a user's own
    #: methods of the object that the thing makes; arguments are checked if given: "close()". ():
    #: the thing is called for its result
    methods: tuple[str, ...] = ()
    #: its class, if the kind is no function: it has ``mistake()``, and the row's class has
    #: ``of(thing)``
    instance: type[Any] | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the rows, in order."""
        return tuple(row.name for row in self.rows)

    def bind(self, row: Row, settings: Settings | None) -> Callable[..., Any]:
        """The function of a row with its settings bound. An error of a user's own becomes a
        UserError that names it and the place.
        """
        function = row.bind(settings)
        if row.own is None:
            return function

        def blamed(*given: Any) -> Any:
            with blame(f"the {self.noun} {row.name!r}", f"correct the {self.noun}"):
                return function(*given)

        return blamed


LOSSES = Kind(
    "loss",
    "algorithm.name",
    LossEntry,
    LOSS_ROWS,
    ("inputs",),
    "@loss(denominator='tokens') or 'sequences'",
)
ADVANTAGES = Kind(
    "advantage estimator",
    "algorithm.advantages",
    AdvantagesEntry,
    ADVANTAGE_ROWS,
    ("rewards",),
    "@advantages()",
)
CORRECTIONS = Kind(
    "correction",
    "algorithm.mismatch",
    CorrectionEntry,
    CORRECTION_ROWS,
    ("inputs",),
    "@correction()",
)
VERIFIERS = Kind(
    "verifier",
    "reward.name",
    VerifierEntry,
    VERIFIER_ROWS,
    ("record", "completion"),
    "@verifier()",
)
ENGINES = Kind(
    "rollout engine",
    "rollout.engine",
    EngineEntry,
    ENGINE_ROWS,
    ("parts",),
    "@engine()",
    methods=("generate", "begin", "weights_changed", "metrics", "close"),
)
OPTIMIZERS = Kind(
    "optimizer",
    "optimizer.name",
    OptimizerEntry,
    OPTIMIZER_ROWS,
    ("params",),
    "@optimizer()",
    methods=("step()",),
)
LOGGERS = Kind(
    "logger",
    "observe.loggers",
    LoggerEntry,
    LOGGER_ROWS,
    ("run",),
    "@logger()",
    methods=("log(step, metrics)", "close()"),
)
FAMILIES = Kind(
    "Hugging Face family", "model.family", FamilyEntry, FAMILY_ROWS, (), "", instance=Family
)
SOURCES = Kind(
    "data source",
    "data.train",
    SourceEntry,
    SOURCE_ROWS,
    (),
    "@source()",
)

ENVIRONMENTS = Kind(
    "environment",
    "rollout.environment",
    EnvironmentEntry,
    ENVIRONMENT_ROWS,
    ("record", "turns"),
    "@environment()",
)

#: Kinds by the word that `megatron-rl list` takes.
KINDS: dict[str, Kind[Any]] = {
    "losses": LOSSES,
    "advantages": ADVANTAGES,
    "corrections": CORRECTIONS,
    "rewards": VERIFIERS,
    "engines": ENGINES,
    "environments": ENVIRONMENTS,
    "optimizers": OPTIMIZERS,
    "loggers": LOGGERS,
    "families": FAMILIES,
    "sources": SOURCES,
}
