"""The nearest valid name to a misspelt one."""

from __future__ import annotations

from difflib import SequenceMatcher
from typing import Iterable

#: A longer text is no misspelt name, and comparing takes time quadratic in its length.
_LONGEST = 100


def nearest(found: str, valid: Iterable[str]) -> str | None:
    """The valid name most similar to ``found``; None: none is similar.

    Dotted names are compared whole and by their last part: ``model.temperature`` finds
    ``rollout.temperature``. The whole name breaks ties.
    """

    def likeness(name: str) -> tuple[float, float]:
        whole = SequenceMatcher(None, found, name).ratio()
        last = SequenceMatcher(None, found.rpartition(".")[2], name.rpartition(".")[2]).ratio()
        return max(whole, last), whole

    if len(found) > _LONGEST:
        return None
    best = max(valid, key=likeness, default=None)
    return best if best is not None and likeness(best)[0] >= 0.6 else None


def did_you_mean(found: str, valid: Iterable[str]) -> str:
    """`` (did you mean NAME?)`` or nothing."""
    name = nearest(found, valid)
    return "" if name is None else f" (did you mean {name}?)"
