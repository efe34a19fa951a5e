"""The interface of a kind of hostile input: makes cases, and judges their outcome."""

from __future__ import annotations

import enum
import importlib
import pkgutil
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, ContextManager


class Verdict(enum.Enum):
    """The program's correct reaction to a case."""

    TAKEN = "taken"
    REFUSED = "refused"


class Wrong(AssertionError):
    """The oracle disagrees: the program wrongly accepted, valued or refused a case."""


#: Judges a case; see `Kind`.
Judge = Callable[[Any], Verdict]


@dataclass(frozen=True)
class Kind:
    """One kind of input: ``KIND`` of a file in ``tools/fuzz/kinds``."""

    name: str
    #: makes a case only from the given randomness, so that its number reproduces it
    make: Callable[[random.Random], Any]
    #: an empty folder -> a context that gives the judge, with costly set-up done once
    judging: Callable[[Path], ContextManager[Judge]]
    #: seconds after which a case counts as a hang; generous, for busy machines
    deadline_s: float = 10.0
    #: share of the requested cases to run: below 1 if a case costs a process
    share: float = 1.0


def all_kinds() -> dict[str, Kind]:
    """Every kind of ``tools/fuzz/kinds`` by its name, in the order of the files."""
    from tools.fuzz import kinds

    files = sorted(module.name for module in pkgutil.iter_modules(kinds.__path__))
    found = [importlib.import_module(f"{kinds.__name__}.{name}").KIND for name in files]
    return {kind.name: kind for kind in found}
