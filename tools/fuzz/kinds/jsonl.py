"""Data sets: an accepted line is one object, and its problem can be written again."""

from __future__ import annotations

import contextlib
import json
import random
from pathlib import Path
from typing import Iterator

from megatron_rl.config.schema import DataConfig
from megatron_rl.data.jsonl import load_records
from megatron_rl.data.problems import read_problems
from megatron_rl.errors import UserError
from megatron_rl.rewards.countdown import check_countdown_record
from tools.fuzz.kind import Judge, Kind, Verdict, Wrong
from tools.fuzz.kinds.json_text import check
from tools.fuzz.mutate import RAW, as_text, changed, encoded, is_plain

_LINES = (
    {"prompt": "2 + 2", "numbers": [2, 2], "target": 4},
    {"prompt": [{"role": "user", "content": "2 + 2"}], "numbers": [2, 2], "target": 4},
    {"prompt": '[{"role": "user", "content": "2 + 2"}]', "numbers": [2, 2], "target": 4},
    {"prompt": [{"role": "user", "content": [{"type": "text", "text": "x"}]}], "target": 4},
)


def make(rng: random.Random) -> bytes:
    """A few lines, some of them spoiled."""
    lines = []
    for _ in range(rng.randint(1, 3)):
        value = rng.choice(_LINES)
        if rng.random() < 0.4:
            lines.append(json.dumps(value))
        elif rng.random() < 0.2:
            lines.append(rng.choice(RAW))
        else:
            lines.append(as_text(rng, changed(rng, value, rng.randrange(3))))
    data = encoded(rng, rng.choice(["\n", "\n", "\r\n", "\n\n", "\r"]).join(lines))
    return data + rng.choice([b"", b"\n", b"\n\n \n", b"\0"])


@contextlib.contextmanager
def judging(folder: Path) -> Iterator[Judge]:
    """The records by themselves, and the problems made of them."""
    path = folder / "data.jsonl"
    settings = DataConfig(train=path)

    def judge(data: bytes) -> Verdict:
        path.write_bytes(data)
        lines = data.rstrip(b"\r\n ").split(b"\n")
        try:
            records = load_records(path)
        except UserError:
            if all(line.startswith(b"{") and is_plain(line) for line in lines):
                raise Wrong(f"refused: {data[:300]!r}") from None
            raise
        if records != [json.loads(line.removeprefix(b"\xef\xbb\xbf")) for line in lines]:
            raise Wrong(f"other records: {data[:300]!r}")
        check(records)
        for problem in read_problems(path, settings, check_countdown_record).problems:
            json.dumps(problem.prompt, ensure_ascii=False).encode("utf-8")
            json.dumps(dict(problem.record), allow_nan=False).encode("utf-8")
        return Verdict.TAKEN

    yield judge


KIND = Kind("jsonl", make, judging)
