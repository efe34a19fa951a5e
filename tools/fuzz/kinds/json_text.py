"""JSON texts: an accepted one equals another reader's value, and fits files and floats."""

from __future__ import annotations

import contextlib
import json
import math
import random
from pathlib import Path
from typing import Any, Iterator

from megatron_rl.config.json_text import MOST_LEVELS, BadJson, parse_json
from tools.fuzz.kind import Judge, Kind, Verdict, Wrong
from tools.fuzz.mutate import RAW, as_text, changed, encoded, is_plain

_PLAIN = {"a": [1, 2.5, {"b": None}], "c": "text", "d": {"e": True, "f": [[]]}, "g": 10**17}


def make(rng: random.Random) -> bytes:
    """A spoiled text, or one that is nothing but a limit."""
    if rng.random() < 0.1:
        return rng.choice(RAW).encode("utf-8", "surrogatepass") * rng.choice([1, 1, 2, 50])
    return encoded(rng, as_text(rng, changed(rng, _PLAIN, rng.randrange(4))))


@contextlib.contextmanager
def judging(folder: Path) -> Iterator[Judge]:
    """The value is compared with the standard library's."""

    def judge(data: bytes) -> Verdict:
        try:
            value = parse_json(data)
        except BadJson as error:
            if is_plain(data):
                raise Wrong(f"refused ({error}): {data[:200]!r}") from error
            return Verdict.REFUSED
        if value != json.loads(data.decode("utf-8")):
            raise Wrong(f"another value: {data[:200]!r}")
        check(value)
        return Verdict.TAKEN

    yield judge


def check(value: Any, level: int = 1, infinities: bool = False) -> None:
    """Wrong: the value is deeper or larger than what looks at it can take."""
    if level > MOST_LEVELS + 1:
        raise Wrong("too deep")
    if isinstance(value, str):
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise Wrong("half a character") from error
    elif isinstance(value, (int, float)):
        large = abs(value) >= 10**300 if isinstance(value, int) else not math.isfinite(value)
        if large and not (infinities and isinstance(value, float)):
            raise Wrong("a number too large")
    elif isinstance(value, (dict, list)):
        inner = [*value, *value.values()] if isinstance(value, dict) else value
        for item in inner:
            check(item, level + 1, infinities)


KIND = Kind("json", make, judging)
