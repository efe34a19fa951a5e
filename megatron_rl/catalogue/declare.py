"""Decorators that make a user's own function a row of the catalogue."""

from __future__ import annotations

import inspect
from typing import Any, Callable, Literal, TypeVar

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
from megatron_rl.catalogue.settings import Settings

#: Attribute of a decorated object that holds its row.
ATTRIBUTE = "__catalogue_entry__"

Thing = TypeVar("Thing", bound=Callable[..., Any])


def loss(
    *,
    denominator: Literal["tokens", "sequences"],
    router_shift: Literal["needed", "optional", "ignored"] = "ignored",
    geometric: bool = False,
    sampler_weights: bool = False,
    settings: type[Settings] | None = None,
    paper: str = "",
) -> Callable[[Thing], Thing]:
    """Declare a policy loss, ``(LossInputs[, settings]) -> LossOutputs``.

    For the traits see `LossEntry`. Before it starts a run tries the loss on a small batch and
    refuses one whose behaviour differs from its declaration. The summary is the docstring's first
    line.
    """
    traits = {
        "denominator": denominator,
        "router_shift": router_shift,
        "geometric": geometric,
        "sampler_weights": sampler_weights,
    }
    return lambda thing: _attach(thing, LossEntry, settings, paper=paper, **traits)


def advantages(
    *, settings: type[Settings] | None = None, paper: str = ""
) -> Callable[[Thing], Thing]:
    """Declare an advantage estimator, ``(rewards [P, G][, settings]) -> [P, G]``. One without
    settings needs no decorator.
    """
    return lambda thing: _attach(thing, AdvantagesEntry, settings, paper=paper)


def correction(
    *, settings: type[Settings] | None = None, paper: str = ""
) -> Callable[[Thing], Thing]:
    """Declare a sampler correction, ``(LossInputs[, settings]) -> SamplerWeights``. One without
    settings needs no decorator.
    """
    return lambda thing: _attach(thing, CorrectionEntry, settings, paper=paper)


def verifier(
    *,
    settings: type[Settings] | None = None,
    needs: tuple[str, ...] = (),
    check: Callable[[Any], None] | None = None,
    machine_check: Callable[[], None] | None = None,
    paper: str = "",
) -> Callable[[Thing], Thing]:
    """Declare a verifier, ``(record, completion[, settings]) -> Reward``: a function, an ``async
    def``, or a class that is made once (with its settings) and called with record and completion. A
    verifier without settings and needs requires no decorator.

    Args:
        settings: the class of its settings.
        needs: keys that every record must have.
        check: called with every record before the run starts; raises `UserError`.
        machine_check: called once before the run starts, and by ``check``; raises `UserError`.
        paper: where the definition is from.
    """
    checks = {"needs": tuple(needs), "check": check, "machine_check": machine_check}
    return lambda thing: _attach(thing, VerifierEntry, settings, paper=paper, **checks)


def engine(
    *,
    beside_training: bool = False,
    routes: bool = False,
    kept_tokens: bool = False,
    settings: type[Settings] | None = None,
    paper: str = "",
) -> Callable[[Thing], Thing]:
    """Declare a rollout engine, ``(EngineParts[, settings]) -> Engine``: a class, or a function
    that makes one. For the traits see `EngineEntry`. An engine without settings and traits needs no
    decorator.
    """
    traits = {
        "beside_training": beside_training, "routes": routes, "kept_tokens": kept_tokens
    }  # fmt: skip
    return lambda thing: _attach(thing, EngineEntry, settings, paper=paper, **traits)


def environment(
    *, settings: type[Settings] | None = None, paper: str = ""
) -> Callable[[Thing], Thing]:
    """Declare an environment, ``(record, turns[, settings]) -> text or None``: a function, or a
    class that is made once (with its settings) and called with record and turns. One without
    settings needs no decorator.
    """
    return lambda thing: _attach(thing, EnvironmentEntry, settings, paper=paper)


def optimizer(
    *, settings: type[Settings] | None = None, split_weights: bool = False, paper: str = ""
) -> Callable[[Thing], Thing]:
    """Declare an optimizer, ``(params[, settings]) -> torch.optim.Optimizer``: a class, or a
    function that makes one. One with the defaults below needs no decorator.

    ``params`` are parameter groups, as torch's optimizers take them. Before every step the run sets
    ``lr`` and ``weight_decay`` of each. ``group["matrices"]`` holds for each parameter its matrices
    (``megatron_rl.optimizers.matrices.Matrix``), () for norms, biases and embeddings.

    Args:
        settings: the class of its settings.
        split_weights: True if the optimizer is right when a rank holds slices of matrices, or some
            of a layer's experts: it acts on each element separately, or on ``group["matrices"]``.
            False: runs with such a layout are refused.
        paper: where the definition is from.
    """
    traits = {"split_weights": split_weights}
    return lambda thing: _attach(thing, OptimizerEntry, settings, paper=paper, **traits)


def logger(*, settings: type[Settings] | None = None) -> Callable[[Thing], Thing]:
    """Declare a logger, ``(run[, settings])`` -> an object with ``log(step, metrics)`` and
    ``close()``; usually a class. One without settings needs no decorator.
    """
    return lambda thing: _attach(thing, LoggerEntry, settings)


def source(*, settings: type[Settings] | None = None) -> Callable[[Thing], Thing]:
    """Declare a data source, ``([settings]) -> iterable of records``: mappings of JSON values, the
    same in every call and on every rank. One without settings needs no decorator.
    """
    return lambda thing: _attach(thing, SourceEntry, settings)


def row_of(thing: Any, kind: type[Entry]) -> Entry:
    """The row of an object: its decorator's, else one with its kind's defaults. TypeError: the kind
    has a trait without a default.
    """
    # Not inherited: a subclass of a decorated class has no row.
    declared = vars(thing).get(ATTRIBUTE) if hasattr(thing, "__dict__") else None
    return declared or kind(**_described(thing))


def _attach(thing: Thing, kind: type[Entry], settings: type[Settings] | None, **more: Any) -> Thing:
    setattr(thing, ATTRIBUTE, kind(**_described(thing), settings=settings, **more))
    return thing


def _described(thing: Any) -> dict[str, Any]:
    name = getattr(thing, "__name__", type(thing).__name__)
    doc = inspect.getdoc(thing) or ""
    return {
        "name": name,
        "summary": doc.partition("\n")[0],
        "code": f"{getattr(thing, '__module__', '')}:{name}",
        "own": thing,
    }
