"""Topological sort: put items in an order that keeps every given "x before y".

An answer names the items in order, with white space or commas between them; items of one character
each may also stand side by side: "cabd". Most problems have many right answers.
"""

from __future__ import annotations

import graphlib
from collections import Counter
from typing import Any, Mapping

from megatron_rl.catalogue.verifiers import TopologicalSortSettings
from megatron_rl.errors import UserError, shown
from megatron_rl.rewards.base import Reward, make_reward, require
from megatron_rl.rewards.countdown import ExpressionError, extract_answer

_NAME = "topological_sort"
_DEFAULTS = TopologicalSortSettings()


def verify_topological_sort(
    record: Mapping[str, Any], completion: str, settings: TopologicalSortSettings = _DEFAULTS
) -> Reward:
    """1.0 solved, ``settings.well_formed`` (0.1) well formed, 0.0 otherwise.

    Well formed: each item of ``record["items"]`` once and nothing else. Solved: also, x stands
    before y for each pair (x, y) of ``record["before"]``. Never raises on a completion; the time is
    linear in its length.
    """
    items, before = _problem(record)
    try:
        order = _read(extract_answer(completion), items)
    except ExpressionError as error:
        return make_reward(False, False, str(error))
    if Counter(order) != Counter(items):
        return make_reward(False, False, f"not each of {_listed(items)} once")
    place = {item: number for number, item in enumerate(order)}
    for first, second in before:
        if place[first] >= place[second]:
            reason = f"{_short(first)} is not before {_short(second)}"
            return make_reward(False, True, reason, settings.well_formed)
    return make_reward(True, True, "solved")


def _read(answer: str, items: list[str]) -> list[str]:
    names = answer.replace(",", " ").split()
    if all(len(item) == 1 for item in items):
        return list("".join(names))
    return names


def check_topological_sort_record(record: Mapping[str, Any]) -> None:
    """Raises ``UserError`` if the record lacks ``items`` or ``before``, they have a wrong type, a
    pair names something else, or no order keeps all pairs.
    """
    items, before = _problem(record)
    sorter = graphlib.TopologicalSorter({item: () for item in items})
    for first, second in before:
        sorter.add(second, first)
    try:
        sorter.prepare()
    except graphlib.CycleError as error:
        raise UserError(
            f"before has the cycle {_listed(error.args[1])}; the verifier {_NAME!r} expects pairs "
            "that some order keeps; correct the data set"
        ) from None


def _problem(record: Mapping[str, Any]) -> tuple[list[str], list[tuple[str, str]]]:
    items, before = require(record, "items", _NAME), require(record, "before", _NAME)
    names = isinstance(items, (list, tuple)) and all(_is_name(item) for item in items)
    if not names or not items or len(set(items)) < len(items):
        raise UserError(
            f"items {shown(items)}; the verifier {_NAME!r} expects a list of different names "
            "without white space or commas; correct the data set"
        )
    known = set(items)
    pairs = isinstance(before, (list, tuple)) and all(
        isinstance(pair, (list, tuple))
        and len(pair) == 2
        and all(isinstance(item, str) and item in known for item in pair)
        for pair in before
    )
    if not pairs:
        raise UserError(
            f"before {shown(before)}; the verifier {_NAME!r} expects a list of pairs of "
            "items; correct the data set"
        )
    return list(items), [(first, second) for first, second in before]


def _is_name(item: Any) -> bool:
    return isinstance(item, str) and item.replace(",", " ").split() == [item]


def _listed(items: list[str]) -> str:
    listed = " ".join(map(_short, items[:8]))
    return listed + " ..." if len(items) > 8 else listed


def _short(item: str) -> str:
    return ascii(item)[1:-1][:20]
