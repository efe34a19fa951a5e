"""CSV and TSV files (RFC 4180): rows -> records; mistakes name file and row."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any, BinaryIO, Iterator

from megatron_rl.catalogue.sources import CsvSettings
from megatron_rl.config.json_text import BadJson, parse_json
from megatron_rl.data.jsonl import MAX_LINE_BYTES
from megatron_rl.data.unpack import opened
from megatron_rl.errors import UserError, printable


def read_rows(path: Path, settings: CsvSettings) -> Iterator[dict[str, Any]]:
    """The rows below the header, as records with the header's columns.

    Raises ``UserError`` with the file and the row (from 1, without the header) or line: the file is
    missing, unreadable or not UTF-8; the header has a duplicate or unnamed column, or lacks a
    requested one; a row has more or fewer cells, is longer than ``MAX_LINE_BYTES``, or has a
    misplaced quote; a JSON cell is not JSON.
    """
    name = path.name.lower().removesuffix(".gz").removesuffix(".zst")
    delimiter = settings.delimiter or ("\t" if name.endswith(".tsv") else ",")
    number = 0
    before = csv.field_size_limit(MAX_LINE_BYTES)
    try:
        with opened(path, "a CSV file") as file:
            lines = _Lines(file, path)
            rows = csv.reader(lines, delimiter=delimiter, strict=True)
            header = _header(path, next(rows, []), settings)
            lines.begin_row()
            for number, cells in enumerate(rows, start=1):
                lines.begin_row()
                if cells or len(header) == 1:
                    yield _record(f"{path}, row {number}", header, cells or [""], settings)
                elif any(rows):  # blank lines end a file
                    raise UserError(
                        f"{path}, row {number}: blank; expected {len(header)} cells; drop the line"
                    )
    except csv.Error as error:
        raise UserError(
            f"{path}, row {number + 1}: not CSV ({error}); expected cells as RFC 4180 has them; "
            "correct it"
        ) from error
    except OSError as error:
        raise UserError(
            f"{path}, row {number + 1}: cannot be read ({error.strerror or error}); expected a "
            "readable CSV file; correct the file, its rights or the limits of the process (ulimit)"
        ) from error
    finally:
        csv.field_size_limit(before)


class _Lines:
    """The lines of a file as text; refuses rows that are too long."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self._file, self._path, self._number, self._row_bytes = file, path, 0, 0

    def begin_row(self) -> None:
        """Begin a new row."""
        self._row_bytes = 0

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        line = self._file.readline(MAX_LINE_BYTES + 1)
        if not line:
            raise StopIteration
        self._number += 1
        self._row_bytes += len(line)
        where = f"{self._path}, line {self._number}"
        if self._row_bytes > MAX_LINE_BYTES:
            raise UserError(
                f"{where}: a row longer than {MAX_LINE_BYTES / 2**20:g} MiB; expected cells that "
                "end; close the quote, split the row or drop it"
            )
        try:
            return line.decode("utf-8-sig" if self._number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise UserError(
                f"{where}: byte {error.start + 1} is not UTF-8; expected UTF-8; convert the file"
            ) from None


def _header(path: Path, header: list[str], settings: CsvSettings) -> list[str]:
    wrong = next((n for n, name in enumerate(header) if not name or name in header[:n]), None)
    if wrong is not None:
        raise UserError(
            f"{path}: column {wrong + 1} of the header is {printable(repr(header[wrong]))}; "
            "expected a name of its own for each column; correct the first line"
        )
    missing = next((name for name in settings.json_columns if name not in header), None)
    if header and missing is not None:
        raise UserError(
            f"{path}: no column {missing!r} among {printable(', '.join(header))}; expected those "
            "of json_columns; correct the settings"
        )
    return header


def _record(
    where: str, header: list[str], cells: list[str], settings: CsvSettings
) -> dict[str, Any]:
    if len(cells) != len(header):
        raise UserError(
            f"{where}: {len(cells)} cells; expected {len(header)}, as the header has; quote cells "
            "that hold the delimiter or a line end"
        )
    record: dict[str, Any] = dict(zip(header, cells))
    for name in settings.json_columns:
        try:
            record[name] = parse_json(record[name], most_bytes=MAX_LINE_BYTES)
        except BadJson as error:
            raise UserError(
                f"{where}: {name!r} is not JSON ({error}); expected a JSON value; correct the cell"
            ) from error
    return record
