"""Configurations from a file and flags: an accepted one reads back as it was written."""

from __future__ import annotations

import contextlib
import json
import random
from pathlib import Path
from typing import Iterator

from megatron_rl.config.checks import check_config
from megatron_rl.config.fields import leaf_fields
from megatron_rl.config.load import dump_config, load_config, written_values
from megatron_rl.config.schema import Config
from megatron_rl.config.yaml_text import dump_yaml
from tools.fuzz.kind import Judge, Kind, Verdict, Wrong
from tools.fuzz.mutate import ODD, RAW, as_text, changed, encoded

_PLAIN = {"model": {"preset": "tiny_moe"}}
_LEAVES = sorted(leaf_fields())
_VALUES = written_values(Config())


def make(rng: random.Random) -> tuple[bytes, list[str]]:
    """(the file, the command line's arguments)."""
    section = rng.choice([name for name, value in _VALUES.items() if isinstance(value, dict)])
    value = {**_PLAIN, section: {**_VALUES[section], **_PLAIN.get(section, {})}}
    if rng.random() < 0.7:
        value = changed(rng, value, rng.randint(1, 2))
    words = []
    for _ in range(rng.randrange(3)):
        odd = rng.choice([*RAW, *(json.dumps(odd) for odd in ODD), *map(str, ODD)])
        words += [f"--{rng.choice(_LEAVES)}{rng.choice(['', '', '', '.x', 'x'])}", odd]
    text = dump_yaml(value) if rng.random() < 0.3 else as_text(rng, value)
    return encoded(rng, text), words


@contextlib.contextmanager
def judging(folder: Path) -> Iterator[Judge]:
    """A file, and another for the configuration written again."""
    file, again = folder / "run.yaml", folder / "again.yaml"

    def judge(case: tuple[bytes, list[str]]) -> Verdict:
        data, words = case
        file.write_bytes(data)
        config = load_config(file, words, "generate")
        again.write_text(dump_config(config), encoding="utf-8")
        if load_config(again, [], "generate") != config:
            raise Wrong(f"another configuration when written again: {words} {data[:300]!r}")
        check_config(config, None, "generate", files=False)
        return Verdict.TAKEN

    yield judge


KIND = Kind("config", make, judging)
