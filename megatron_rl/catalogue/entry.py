"""A row of the catalogue: a thing that a configuration names, with what rules may ask of it."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Literal

from megatron_rl.catalogue.settings import Settings


@dataclass(frozen=True, kw_only=True)
class Entry:
    """What every row holds. The code is imported by `load`, and by nothing else."""

    name: str  #: as a configuration gives it: a row's name, or a reference to a user's own
    summary: str  #: one line
    code: str  #: "module:object"
    settings: type[Settings] | None = None  #: class of its settings; None: it has none
    paper: str = ""  #: where the definition is from
    own: Any = None  #: of a user's own: the object itself
    file: Path | None = None  #: of a user's own: the Python file it is in

    def load(self) -> Any:
        """The object."""
        return load(self.code) if self.own is None else self.own

    def bind(self, settings: Settings | None) -> Callable[..., Any]:
        """The function with its settings, which are the last argument of one that has any."""
        function = self.load()
        return function if settings is None else lambda *given: function(*given, settings)


@dataclass(frozen=True, kw_only=True)
class LossEntry(Entry):
    """A policy loss: ``(LossInputs[, settings]) -> LossOutputs`` (``algorithms/interface.py``)."""

    #: what its denominator counts: trained tokens, or sequences with a trained token
    denominator: Literal["tokens", "sequences"]
    #: needed: the loss raises without gamma~; optional: it scales ratios where it is given;
    #: ignored: the loss is the same with it
    router_shift: Literal["needed", "optional", "ignored"] = "ignored"
    #: one ratio a sequence, a geometric mean of its tokens' ratios
    geometric: bool = False
    #: its terms are multiplied by the weights of ``algorithm.mismatch``
    sampler_weights: bool = False


@dataclass(frozen=True, kw_only=True)
class AdvantagesEntry(Entry):
    """An advantage estimator: ``(rewards [P, G][, settings]) -> advantages [P, G]``."""


@dataclass(frozen=True, kw_only=True)
class CorrectionEntry(Entry):
    """Weights against the sampler's mismatch: ``(LossInputs[, settings]) -> SamplerWeights``."""


@dataclass(frozen=True, kw_only=True)
class EngineEntry(Entry):
    """A rollout engine: ``(EngineParts[, settings]) -> Engine`` (``rollout/engine.py``)."""

    servers: bool = False  #: its answers are those of servers: ``rollout.servers`` is of it
    beside_training: bool = False  #: it answers while the model trains, as ``rollout.lag`` asks
    routes: bool = False  #: its completions can carry the experts of their tokens
    broadcast: bool = False  #: running servers take weights through a process group
    #: its log-probabilities are right with top-p or top-k at a temperature other than 1
    tempered_cuts: bool = True


@dataclass(frozen=True, kw_only=True)
class VerifierEntry(Entry):
    """A verifier: ``(record, completion[, settings]) -> Reward``, a function, an ``async def``, or
    a class that is made once, of the settings it has, and then called so.
    """

    needs: tuple[str, ...] = ()  #: keys that every record has to have
    #: "module:object", or a function: ``(record) -> None``; `UserError` for a record that no
    #: completion could be judged by. Cheap: no process, no completion
    check: str | Callable[[Any], None] | None = None
    #: without arguments: `UserError` where this machine lacks what the verifier needs. One of the
    #: package returns facts of this machine for a run's header, {name: text}
    machine_check: str | Callable[[], Any] | None = None


@dataclass(frozen=True, kw_only=True)
class EnvironmentEntry(Entry):
    """What replies to the policy: ``(record, turns[, settings]) -> text or None``, a function, or a
    class that is made once, of the settings it has, and then called so.
    """


@dataclass(frozen=True, kw_only=True)
class OptimizerEntry(Entry):
    """An optimizer: ``(parameter groups[, settings]) -> torch.optim.Optimizer``."""

    #: Megatron makes it by itself, and can share its state out over the data-parallel ranks
    #: (``parallel.distributed_optimizer``)
    of_megatron: bool = False
    #: right where a rank holds slices of matrices, or some of a layer's experts: it acts on each
    #: element by itself, or on the whole ``matrices`` of its groups
    split_weights: bool = False
    #: tensors of its state for a weight that is a matrix of a layer; others are taken to have 2
    matrix_moments: int = 2


@dataclass(frozen=True, kw_only=True)
class LoggerEntry(Entry):
    """A logger: ``(run[, settings])`` -> an object with ``log(step, metrics)`` and ``close()``."""


@dataclass(frozen=True, kw_only=True)
class SourceEntry(Entry):
    """Where records come from: ``(path[, settings])`` for a row of this package, ``([settings])``
    for a user's own; each call gives the records, mappings of JSON values, in the same order.
    """

    endings: tuple[str, ...] = ()  #: of the names of files that are read so
    unit: str = "record"  #: what a record is called in messages: "line 7 of ..."
    needs: str = ""  #: the library that reads it, where it is none of Python's


def load(code: str) -> Any:
    """The object of ``module:object``."""
    module, _, name = code.partition(":")
    return getattr(importlib.import_module(module), name)


def load_check(check: str | Callable[..., Any] | None) -> Callable[..., Any] | None:
    """A check of an entry as a function."""
    return load(check) if isinstance(check, str) else check
