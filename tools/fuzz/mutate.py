"""Ways to spoil a text, bytes or a JSON value."""

from __future__ import annotations

import copy
import json
import random
import re
from typing import Any

#: Values of a type or size that no field expects.
ODD: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 3, 2**31, 2**63, -(2**63), 10**18, 10**40, 10**299),
    *(0.5, -0.0, 1e-320, 1e308, float("inf"), float("-inf"), float("nan")),
    *("", "x", "4", "\0", "two\nlines", "a" * 2000, "../../etc/passwd", "/dev/zero", "\u202e"),
    *("\ud83d", "\U0001f600", "{{ 1 }}", "${HOME}", "~", "%s", "\x1b[31m", "<b>"),
    *([], [0], [[]], [None], ["x", 3], [1] * 1000, {}, {"a": {}}, {"": 0}, {"rope_type": 3}),
)
#: Pieces of JSON text at its limits.
RAW = (
    *("9" * 5000, "9" * 301, "1e999", "-1e999", "NaN", "Infinity", "-Infinity", "1.7", "1e5"),
    *("[" * 3000, "[" * 80 + "]" * 80, '{"a":' * 200 + "1" + "}" * 200, '"\\ud83d"', '"\\u0000"'),
    *(
        '{"a": 1, "a": 2}',
        "",
        "tru",
        "01",
        "+1",
        "'x'",
        "[1,]",
        "// no",
        '"\\x"',
        '"\t"',
        "\ufeff{}",
    ),
)


def flipped(rng: random.Random, data: bytes, most: int = 3) -> bytes:
    """Some bits turned over, bytes cut, doubled or put in; at least one differs."""
    spoiled = bytearray(data)
    for _ in range(rng.randint(1, most)):
        place = rng.randrange(len(spoiled) + 1)
        way = rng.randrange(5)
        if way <= 1 and place < len(spoiled):
            spoiled[place] ^= 1 << rng.randrange(8)
        elif way == 2:
            del spoiled[place : place + rng.choice([1, 2, 8, 1000])]
        elif way == 3:
            spoiled[place:place] = bytes(rng.randrange(256) for _ in range(rng.choice([1, 2, 8])))
        else:
            spoiled[place:place] = spoiled[place : place + rng.choice([1, 8, 64])]
    return bytes(spoiled) if bytes(spoiled) != data else flipped(rng, data, most)


def places(value: Any, above: tuple = ()) -> list[tuple]:
    """The path of every value inside a JSON value."""
    found = [above] if above else []
    if isinstance(value, (dict, list)):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            found += places(item, (*above, key))
    return found


def changed(rng: random.Random, value: Any, times: int = 1) -> Any:
    """A copy with odd values, without some keys, or with some more."""
    value = copy.deepcopy(value)
    for _ in range(times):
        found = places(value)
        if not found:
            break
        *path, last = rng.choice(found)
        inside = value
        for key in path:
            inside = inside[key]
        way = rng.randrange(5)
        if way == 0 and isinstance(inside, dict):
            del inside[last]
        elif way == 1 and isinstance(inside, dict):
            inside[rng.choice(["x", "", "__class__", "a\nb", "a" * 300])] = rng.choice(ODD)
        else:
            inside[last] = copy.deepcopy(rng.choice(ODD))
    return value


def as_text(rng: random.Random, value: Any) -> str:
    """JSON text of a value, some of them with a piece at the limits of JSON in a value's place."""
    text = json.dumps(value, ensure_ascii=rng.random() < 0.8)
    if rng.random() < 0.7:
        return text
    mark = f"mark{rng.random()}"
    marked = copy.deepcopy(value)
    found = places(marked)
    if not found:
        return rng.choice(RAW)
    *path, last = rng.choice(found)
    inside = marked
    for key in path:
        inside = inside[key]
    inside[last] = mark
    return json.dumps(marked).replace(f'"{mark}"', rng.choice(RAW))


def encoded(rng: random.Random, text: str) -> bytes:
    """The text in UTF-8 (half characters as Python would write them), some of it spoiled."""
    data = text.encode("utf-8", "surrogatepass")
    return flipped(rng, data) if data and rng.random() < 0.2 else data


def is_plain(data: bytes) -> bool:
    """Whether a text is JSON beyond doubt, by the standard library alone: what `json.dumps` writes
    of what it holds, with no number or nesting that is near a limit.
    """
    try:
        text = data.decode("utf-8")
        value = json.loads(text)
        plain = json.dumps(value, allow_nan=False) == text
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError):
        return False
    longest = max((len(digits) for digits in re.findall("[0-9]+", text)), default=0)
    return plain and longest < 250 and len(text) < 100_000 and text.count("[[") < 10
