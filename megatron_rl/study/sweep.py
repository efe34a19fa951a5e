"""Arms made from values of keys: every combination, or random draws."""

from __future__ import annotations

import itertools
import math
import random
import re
from typing import Any, Sequence

from megatron_rl.errors import UserError, shown
from megatron_rl.study.schema import MOST_ARMS, Overrides, Range, Sweep

#: An arm's name is a folder's name as well.
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.,=+-]{0,79}")
#: Draws without a new combination after which a random sweep has found all there are.
_MOST_REPEATS = 1000


def sweep_arms(sweep: Sweep) -> dict[str, Overrides]:
    """Name -> overrides, in the order of the grid or of the draws, each combination once.

    A name is ``lr=0.001,name=gmpo``, by the last part of each key where these differ, or
    ``sweep_3`` where that would be no name. UserError: a range that is none, or in a grid; fewer
    combinations than random arms.
    """
    if sweep.kind == "grid":
        combinations = _grid(sweep)
    else:
        combinations = _draws(sweep)
    keys = list(sweep.over)
    short = [key.rpartition(".")[2] for key in keys]
    labels = short if len(set(short)) == len(keys) else keys
    names = [
        ",".join(f"{label}={_text(value)}" for label, value in zip(labels, values))
        for values in combinations
    ]
    fit = len(set(names)) == len(names) and all(map(NAME.fullmatch, names))
    if not fit:
        names = [f"sweep_{number}" for number in range(1, len(names) + 1)]
    return {name: dict(zip(keys, values)) for name, values in zip(names, combinations)}


def _grid(sweep: Sweep) -> list[tuple[Any, ...]]:
    lists = []
    for key, values in sweep.over.items():
        if isinstance(values, Range):
            raise UserError(
                f"sweep.over.{key} is a range; expected a list of values for a grid; list them, or "
                "set sweep.kind random"
            )
        _refuse_repeats(key, values)
        lists.append(values)
    count = math.prod(map(len, lists))
    if count > MOST_ARMS:
        raise UserError(
            f"sweep.over has {count:,} combinations; expected at most {MOST_ARMS:,}; list fewer "
            "values, or set sweep.kind random"
        )
    return list(itertools.product(*lists))


def _draws(sweep: Sweep) -> list[tuple[Any, ...]]:
    for key, values in sweep.over.items():
        if not isinstance(values, Range):
            _refuse_repeats(key, values)
            continue
        ends = "0 < low < high" if values.log else "low < high"
        good = values.low < values.high
        good = good and not (values.log and values.low <= 0)
        if values.whole:
            ends += ", and a whole number between them"
            good = good and math.ceil(values.low) <= math.floor(values.high)
        if not math.isfinite(values.high - values.low):
            good, ends = False, f"{ends}, and a finite width"
        if not good:
            raise UserError(
                f"sweep.over.{key} is a range from {values.low:g} to {values.high:g}; expected "
                f"{ends}; correct it"
            )
    generator = random.Random(sweep.seed)
    found: dict[str, tuple[Any, ...]] = {}
    repeats = 0
    while len(found) < sweep.count:
        drawn = tuple(_draw(values, generator) for values in sweep.over.values())
        repeats = repeats + 1 if repr(drawn) in found else 0
        found.setdefault(repr(drawn), drawn)
        if repeats > _MOST_REPEATS:
            raise UserError(
                f"sweep.count is {sweep.count}, and there are only {len(found)} combinations; "
                "expected at most as many; lower it, or set sweep.kind grid"
            )
    return list(found.values())


def _draw(values: list[Any] | Range, generator: random.Random) -> Any:
    if not isinstance(values, Range):
        return values[generator.randrange(len(values))]
    least, most = math.ceil(values.low), math.floor(values.high)
    if values.whole and not values.log:
        return generator.randint(least, most)
    if values.log:
        value = math.exp(generator.uniform(math.log(values.low), math.log(values.high)))
    else:
        value = generator.uniform(values.low, values.high)
    if values.whole:
        return min(most, max(least, round(value)))
    return float(f"{value:.4g}")  # four digits are enough, and can be read


def _refuse_repeats(key: str, values: Sequence[Any]) -> None:
    texts = [repr(value) for value in values]
    if not values or len(set(texts)) < len(texts):
        raise UserError(
            f"sweep.over.{key} is {shown(values)}; expected one value or more, each once"
        )


def _text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
