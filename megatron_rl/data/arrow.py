"""Parquet files and tables of Apache Arrow: batches of rows -> records."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any, Iterable, Iterator

from megatron_rl.catalogue.sources import ColumnsSettings
from megatron_rl.data.unpack import MOST_BYTES, MOST_TIMES, need
from megatron_rl.data.values import plain_record
from megatron_rl.errors import Stopped, UserError, printable

#: Rows held in memory at a time, as a table and as records.
ROWS = 256


def read_parquet(path: Path, settings: ColumnsSettings) -> Iterator[dict[str, Any]]:
    """The rows of a Parquet file.

    Raises ``UserError`` with the file and the row (from 1): the file is missing or no readable
    Parquet; a requested column is missing; a value is not a JSON value; the rows exceed both
    `unpack.MOST_BYTES` and `unpack.MOST_TIMES` the file's size; pyarrow is not installed.
    """
    if not path.is_file():
        raise UserError(
            f"data set {path} is no file; expected a Parquet file; correct data.train or data.eval"
        )
    parquet = need("pyarrow.parquet", str(path))
    with understood(str(path), "a Parquet file"):
        # not memory-mapped: a shrinking file would kill the process
        file = parquet.ParquetFile(path, memory_map=False)
    with contextlib.closing(file):
        columns = chosen_columns(str(path), file.schema_arrow.names, settings)
        most = max(MOST_BYTES, MOST_TIMES * os.path.getsize(path))
        batches, rows = file.iter_batches(ROWS, columns=columns, use_threads=False), 0
        for record in records_of(str(path), batches, most):
            rows += 1
            yield record
        if rows != file.metadata.num_rows:
            raise UserError(
                f"{path}: {rows:,} rows in it; expected the {file.metadata.num_rows:,} of its "
                "metadata; it is damaged: replace it"
            )


def chosen_columns(name: str, found: list[str], settings: ColumnsSettings) -> list[str]:
    """The columns to read. UserError: one is missing, or occurs twice."""
    columns = list(settings.columns or found)
    missing = next((column for column in columns if column not in found), None)
    if missing is not None:
        raise UserError(
            f"{name}: no column {printable(repr(missing), 60)} among "
            f"{printable(', '.join(found))}; expected those of settings.columns; correct them"
        )
    twice = next((column for column in columns if found.count(column) > 1), None)
    if twice is not None:
        raise UserError(
            f"{name}: the column {printable(repr(twice), 60)} twice; expected names of their own; "
            "write the file with other names"
        )
    return columns


def records_of(name: str, batches: Iterable[Any], most: int | None) -> Iterator[dict[str, Any]]:
    """The rows in batches of a table; ``most``: limit of all their bytes."""
    size, row = 0, 0
    iterator = iter(batches)
    while True:
        with understood(f"{name}, row {row + 1}", "a readable table"):
            batch = next(iterator, None)
            if batch is None:
                return
            size += batch.nbytes
            rows = [] if most is not None and size > most else batch.to_pylist()
        if most is not None and size > most:
            raise UserError(
                f"{name}, row {row + 1}: unpacks to more than {most:,} bytes, {MOST_TIMES} times "
                "its size; expected text; name the columns that are needed with settings.columns, "
                "or store it as JSONL if that is right"
            )
        for record in rows:
            row += 1
            try:
                yield plain_record(record)
            except UserError as error:
                raise UserError(f"{name}, row {row}: {error} (settings.columns)") from error


@contextlib.contextmanager
def understood(name: str, expected: str) -> Iterator[None]:
    """A context in which errors of Arrow and datasets become a UserError that begins with the
    name.
    """
    try:
        yield
    except (UserError, Stopped, MemoryError):
        raise
    # These libraries and their dependencies share no base class of errors.
    except Exception as error:  # noqa: BLE001
        text = printable(" ".join(str(error).split()) or type(error).__name__)
        raise UserError(
            f"{name}: cannot be read ({text}); expected {expected}; correct or replace it"
        ) from error
