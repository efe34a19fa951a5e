"""What a kind of hostile input is: how cases are made, and who judges what became of them."""

from __future__ import annotations

import enum
import importlib
import pkgutil
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, ContextManager


class Verdict(enum.Enum):
    """What the program did with a case, and rightly so."""

    TAKEN = "taken"
    REFUSED = "refused"


class Wrong(AssertionError):
    """The oracle disagrees: something was taken, valued or refused that should not have been."""


#: Judges a case; see `Kind`.
Judge = Callable[[Any], Verdict]


@dataclass(frozen=True)
class Kind:
    """One kind of input. A file of ``tools/fuzz/kinds`` has it as ``KIND``."""

    name: str
    #: a case from the randomness given and nothing else, so that its number finds it again
    make: Callable[[random.Random], Any]
    #: an empty folder -> a context that gives the judge; what is costly is set up once, in there
    judging: Callable[[Path], ContextManager[Judge]]
    #: seconds of a case beyond which it counts as a hang; generous, for machines are busy
    deadline_s: float = 10.0
    #: of 10,000 asked for, how many are run: fewer where one costs a process
    share: float = 1.0


def all_kinds() -> dict[str, Kind]:
    """Every kind of ``tools/fuzz/kinds`` by its name, in the order of the files."""
    from tools.fuzz import kinds

    files = sorted(module.name for module in pkgutil.iter_modules(kinds.__path__))
    found = [importlib.import_module(f"{kinds.__name__}.{name}").KIND for name in files]
    return {kind.name: kind for kind in found}
