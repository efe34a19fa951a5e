"""YAML files: an accepted configuration holds plain values, and reads back as it was written."""

from __future__ import annotations

import contextlib
import json
import random
from pathlib import Path
from typing import Iterator

import yaml

from megatron_rl.config.yaml_text import MOST_NODES, dump_yaml, parse_value, read_yaml
from megatron_rl.errors import UserError
from tools.fuzz.kind import Judge, Kind, Verdict, Wrong
from tools.fuzz.kinds.json_text import check
from tools.fuzz.mutate import ODD, RAW, as_text, changed, encoded, is_plain, places

_CONFIG = {
    "run_dir": "runs/x",
    "seed": 3,
    "model": {"num_layers": 2, "moe_layer_freq": [0, 1], "rope_base": 1e4},
    "rollout": {"temperature": 0.7, "stop_token_ids": [1, 2]},
    "algorithm": {"name": "rspo", "settings": {"clip_low": 0.2}},
}
#: Features that YAML has and JSON lacks.
_PIECES = (
    *("&a [*a]", "&a {<<: *a}", "*none", "<<: 3", "{<<: [{a: 1}, {a: 2}]}", "? [a]\n: 1", "? {}"),
    *("!!bool maybe", "!!int ''", "!!int 0x", "!!float .", "!!null x", "!!str 3", "!!timestamp x"),
    *("!!binary '*'", "!!set {a}", "!!omap [a]", "!!pairs [a]", "!!map [x]", "!!seq {a: 1}"),
    *("!!python/object/apply:os.system ['false']", "!!python/name:os.system", "!x y", "!<!> y"),
    *(
        "%YAML 9.9\n---\na: 1",
        "%TAG ! x\n---\na",
        "--- a\n--- b",
        "...",
        "|\n  x\n y",
        ">9\n x",
        "|x",
    ),
    *(
        '"\\U7fffffff"',
        '"\\ud83d"',
        '"\\x"',
        "'",
        '"',
        "\t- a",
        "- - - a",
        "a: b: c",
        "@",
        "`",
        "%",
    ),
    *(
        "- " * 400 + "a",
        "[" * 2000,
        "{a: " * 300,
        "? " * 300,
        "&a " * 50,
        "!!a " * 50,
        "x" * 300000,
    ),
    *(
        "a0: &a0 [x,x,x,x,x,x,x,x,x]\n"
        + "".join(f"a{n}: &a{n} [{','.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 9)),
        "a: &a {x: 1}\n"
        + "".join(f"k{n}: {{<<: [{','.join(['*a'] * 200)}]}}\n" for n in range(20)),
    ),
    *(
        "1_0",
        "0_",
        "1e999",
        "-.inf",
        ".nan",
        "0o17",
        "1:30",
        "9" * 400,
        "1" + "_" * 400,
        "=",
        "~",
        "on",
    ),
)


def _piece(rng: random.Random) -> str:
    """Pieces that take the parser a second (it looks 1,024 characters ahead) are rare."""
    long = rng.random() < 0.01
    return rng.choice([p for p in (*_PIECES, *RAW) if long or not p.startswith("[" * 1000)])


def make(rng: random.Random) -> bytes:
    """A spoiled configuration in block style or as JSON, or a piece of YAML's own."""
    way = rng.randrange(4)
    if way == 0:
        return encoded(rng, as_text(rng, changed(rng, _CONFIG, rng.randrange(3))))
    if way == 1:
        return _piece(rng).encode("utf-8", "surrogatepass")
    text = yaml.safe_dump(changed(rng, _CONFIG, rng.randrange(3)), allow_unicode=rng.random() < 0.5)
    lines = text.splitlines()
    for _ in range(rng.randrange(3)):
        place = rng.randrange(len(lines))
        piece = rng.choice([_piece(rng), *map(str, ODD)])
        key = lines[place].partition(":")[0]
        lines[place] = rng.choice([f"{key}: {piece}", piece, f"{lines[place]}\n{lines[place]}"])
    return encoded(rng, "\n".join(lines) + "\n")


@contextlib.contextmanager
def judging(folder: Path) -> Iterator[Judge]:
    """Files, and the same text as the value of a flag."""
    file, again = folder / "run.yaml", folder / "again.yaml"

    def judge(data: bytes) -> Verdict:
        with contextlib.suppress(yaml.YAMLError, UnicodeDecodeError):
            _check(parse_value(data.decode("utf-8")))
        file.write_bytes(data)
        try:
            values, lines = read_yaml(file)
        except UserError:
            # PyYAML takes an escaped pair for two halves
            if data.startswith(b"{") and b"\\ud" not in data and is_plain(data) and _named(data):
                raise Wrong(f"refused: {data[:300]!r}") from None
            raise
        _check(values)
        again.write_text(dump_yaml(values), encoding="utf-8")
        if repr(read_yaml(again)[0]) != repr(values):
            raise Wrong(f"not what is written of it: {data[:300]!r}")
        number = data.count(b"\n") + data.count(b"\r") + 3
        if any(not 0 < int(where.rpartition(":")[2]) <= number for where in lines.values()):
            raise Wrong("a line that is none")
        return Verdict.TAKEN

    yield judge


def _check(value: object) -> None:
    check(value, infinities=True)
    waiting, count = [value], 0
    while waiting:
        item = waiting.pop()
        count += 1
        if count > MOST_NODES:
            raise Wrong("more values than the bound")
        if isinstance(item, dict):
            waiting += item.values()
        elif isinstance(item, list):
            waiting += item
        elif not (item is None or type(item) in (bool, int, float, str)):
            raise Wrong(f"a value of type {type(item).__name__}")


def _named(data: bytes) -> bool:
    """Whether all keys are names, which a field's have to be."""
    keys = [key for path in places(json.loads(data)) for key in path if isinstance(key, str)]
    return all(key.isprintable() and len(key) <= 200 for key in keys)


KIND = Kind("yaml", make, judging, deadline_s=30.0)
