"""CSV and Parquet files: the accepted rows equal those of Python's csv, or pyarrow."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import random
from pathlib import Path
from typing import Any, Iterator

import pyarrow
import pyarrow.parquet

from megatron_rl.config.schema_data import DataConfig
from megatron_rl.data.problems import read_problems
from tools.fuzz.kind import Judge, Kind, Verdict, Wrong
from tools.fuzz.mutate import changed

_CELLS = ("2 + 2", 'a "b", c', "x\ny", "", "\u00e9\u2028", "4", "\t", "\0")


def make(rng: random.Random) -> tuple[str, bytes]:
    """The ending of a name, and the content of the file, some of it spoiled."""
    rows = [{"prompt": rng.choice(_CELLS[:3]), "a": rng.choice(_CELLS)} for _ in range(3)]
    if rng.random() < 0.5:
        text = io.StringIO()
        writer = csv.writer(text, lineterminator=rng.choice(["\n", "\r\n"]))
        writer.writerows([list(rows[0]), *(row.values() for row in rows)])
        return "csv", _spoiled(rng, text.getvalue().encode())
    if rng.random() < 0.5:
        rows = [{"prompt": "2 + 2", "a": changed(rng, [1, "x", {"b": None}], 1)}]
    sink = pyarrow.BufferOutputStream()
    try:
        table = pyarrow.Table.from_pylist(rows)
        pyarrow.parquet.write_table(table, sink, compression=rng.choice(["NONE", "zstd"]))
    except (pyarrow.ArrowException, ValueError, TypeError, OverflowError):  # nothing for a table
        return "parquet", b"PAR1"
    return "parquet", _spoiled(rng, sink.getvalue().to_pybytes())


def _spoiled(rng: random.Random, data: bytes) -> bytes:
    spoiled = bytearray(data)
    for _ in range(rng.choice([0, 0, 1, 1, 2, 8])):
        place = rng.randrange(len(spoiled))
        if rng.random() < 0.7:
            spoiled[place] = rng.choice([0, 10, 34, 44, 255, rng.randrange(256)])
        else:
            del spoiled[place : place + rng.choice([1, 1, 20])]
        if not spoiled:
            return b""
    return bytes(spoiled)


@contextlib.contextmanager
def judging(folder: Path) -> Iterator[Judge]:
    """The problems of a file, against its rows by another reader."""

    def judge(case: tuple[str, bytes]) -> Verdict:
        ending, data = case
        path = folder / f"data.{ending}"
        path.write_bytes(data)
        problems = read_problems(path, DataConfig()).problems
        records = [dict(problem.record) for problem in problems]
        for record in records:
            json.dumps(record, ensure_ascii=False, allow_nan=False).encode("utf-8")
        if ending == "csv" and records != _rows(data):
            raise Wrong(f"other rows: {data[:300]!r}")
        if ending == "parquet" and len(records) != pyarrow.parquet.read_metadata(path).num_rows:
            raise Wrong(f"{len(records)} rows")
        return Verdict.TAKEN

    yield judge


def _rows(data: bytes) -> list[dict[str, Any]]:
    lines = io.StringIO(data.decode("utf-8-sig"), newline="")
    return [dict(row) for row in csv.DictReader(lines)]


KIND = Kind("tables", make, judging)
