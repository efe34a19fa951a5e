"""The rows of the catalogue: a row is a thing that a configuration names, with traits for the
rules.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Literal

from megatron_rl.catalogue.settings import Settings


@dataclass(frozen=True, kw_only=True)
class Entry:
    """The fields of every row. Only `load` imports the code."""

    name: str  #: as in a configuration: a row's name, or a reference to a user's own
    summary: str  #: one line
    code: str  #: "module:object"
    settings: type[Settings] | None = None  #: class of its settings; None: no settings
    paper: str = ""  #: where the definition is from
    own: Any = None  #: of a user's own: the object itself
    file: Path | None = None  #: of a user's own: its Python file

    def load(self) -> Any:
        """The object."""
        return load(self.code) if self.own is None else self.own

    def bind(self, settings: Settings | None) -> Callable[..., Any]:
        """The function with its settings bound as the last argument, if it has settings."""
        function = self.load()
        return function if settings is None else lambda *given: function(*given, settings)


@dataclass(frozen=True, kw_only=True)
class LossEntry(Entry):
    """A policy loss: ``(LossInputs[, settings]) -> LossOutputs`` (``algorithms/interface.py``)."""

    #: the denominator counts trained tokens, or sequences with a trained token
    denominator: Literal["tokens", "sequences"]
    #: needed: the loss raises without gamma~; optional: gamma~ scales ratios if given; ignored:
    #: gamma~ has no effect
    router_shift: Literal["needed", "optional", "ignored"] = "ignored"
    #: one ratio for each sequence, the geometric mean of its tokens' ratios
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

    servers: bool = False  #: its answers come from servers: it uses ``rollout.servers``
    beside_training: bool = (
        False  #: it can answer while the model trains, which ``rollout.lag`` needs
    )
    routes: bool = False  #: its completions can hold the experts of their tokens
    #: its completions can hold the tokens that top-p and top-k kept, with log-probabilities over
    #: these, which ``rollout.keep_sampling_mask`` needs
    kept_tokens: bool = False
    broadcast: bool = False  #: running servers can receive weights through a process group
    #: its log-probabilities are exact with top-p or top-k at other temperatures than 1
    tempered_cuts: bool = True


@dataclass(frozen=True, kw_only=True)
class VerifierEntry(Entry):
    """A verifier: ``(record, completion[, settings]) -> Reward``, a function, an ``async def``, or
    a class that is made once with its settings and then called like a function.
    """

    needs: tuple[str, ...] = ()  #: keys that every record must have
    #: "module:object", or a function: ``(record) -> None``; raises `UserError` for a record that
    #: cannot judge any completion. Cheap: starts no process
    check: str | Callable[[Any], None] | None = None
    #: no arguments; raises `UserError` if this machine lacks what the verifier needs. One of this
    #: package may return facts for the run summary, {name: text}
    machine_check: str | Callable[[], Any] | None = None


@dataclass(frozen=True, kw_only=True)
class EnvironmentEntry(Entry):
    """An environment, which replies to the policy: ``(record, turns[, settings]) -> text or None``,
    a function, or a class that is made once with its settings and then called like a function.
    """


@dataclass(frozen=True, kw_only=True)
class OptimizerEntry(Entry):
    """An optimizer: ``(parameter groups[, settings]) -> torch.optim.Optimizer``."""

    #: Megatron makes it, and can shard its state over the data-parallel ranks
    #: (``parallel.distributed_optimizer``)
    of_megatron: bool = False
    #: it is right if a rank holds slices of matrices, or some of a layer's experts: it acts on each
    #: element separately, or on the whole ``matrices`` of its groups
    split_weights: bool = False
    #: tensors of its state for a matrix of a layer; the estimate assumes 2 for other weights
    matrix_moments: int = 2


@dataclass(frozen=True, kw_only=True)
class LoggerEntry(Entry):
    """A logger: ``(run[, settings])`` -> an object with ``log(step, metrics)`` and ``close()``."""


@dataclass(frozen=True, kw_only=True)
class SourceEntry(Entry):
    """A data source: ``(path[, settings])`` for a row of this package, ``([settings])`` for a
    user's own. Each call gives the records, mappings of JSON values, in the same order.
    """

    endings: tuple[str, ...] = ()  #: endings of the file names that it reads
    unit: str = "record"  #: the word for a record in messages: "line 7 of ..."
    needs: str = ""  #: the library that it needs, outside of Python's own


def load(code: str) -> Any:
    """The object of ``module:object``."""
    module, _, name = code.partition(":")
    return getattr(importlib.import_module(module), name)


def load_check(check: str | Callable[..., Any] | None) -> Callable[..., Any] | None:
    """The function of an entry's check."""
    return load(check) if isinstance(check, str) else check
