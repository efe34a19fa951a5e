"""JSONL files: one JSON object a line; mistakes name file and line. No torch, no NumPy."""

from __future__ import annotations

from pathlib import Path
from typing import Any, BinaryIO, Iterator

from megatron_rl.config.json_text import BadJson, parse_json
from megatron_rl.data.unpack import opened
from megatron_rl.errors import UserError

#: Longest line, bytes. A longer one is no prompt, or the file has no line ends; parsing takes
#: several times its size in memory.
MAX_LINE_BYTES = 16 * 2**20


def load_records(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSONL file in order; blank lines are allowed only at the end.

    Raises ``UserError`` with the file and the line (from 1): the file is missing, unreadable or
    empty; a line is longer than ``MAX_LINE_BYTES``, refused by `parse_json`, or no object; memory
    runs out.
    """
    path = Path(path)
    records: list[dict[str, Any]] = []
    try:
        for record in read_records(path):
            records.append(record)
    except MemoryError as error:
        raise UserError(
            f"{path}, line {len(records) + 1}: out of memory; expected room for the whole data set "
            "in every process; raise `ulimit -v` or the memory of the job, or split the file"
        ) from error
    return records


def read_records(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of ``load_records`` one by one."""
    number = 0
    for number, line in enumerate(_lines(path), start=1):
        yield _parse(path, number, line)
    if not number:
        raise UserError(
            f"{path}: empty data set; expected one JSON object a line; "
            "fill the file or name another"
        )


def place(path: Path, index: int) -> str:
    """``data/train.jsonl, line 7`` of the record with index 6."""
    return f"{path}, line {index + 1}"


def _lines(path: Path) -> Iterator[bytes]:
    """The lines of a file without blank lines at its end."""
    number = 0
    try:
        with opened(path, "a JSONL file") as file:
            blank: list[bytes] = []
            while line := _next_line(file, path, number := number + 1):
                if line.isspace():
                    blank.append(line)
                    continue
                yield from blank
                blank.clear()
                yield line
    except OSError as error:
        raise UserError(
            f"{path}, line {number or 1}: cannot be read ({error.strerror or error}); "
            "expected a readable JSONL file; correct the file, its rights or the limits of the "
            "process (ulimit)"
        ) from error


def _next_line(file: BinaryIO, path: Path, number: int) -> bytes:
    # Not splitlines(): JSON text may hold U+2028 and its like unescaped.
    line = file.readline(MAX_LINE_BYTES + 1)
    if len(line) > MAX_LINE_BYTES:
        raise UserError(
            f"{path}, line {number}: longer than {MAX_LINE_BYTES / 2**20:g} MiB; expected one JSON "
            "object a line; split the line or drop it"
        )
    return line


def _parse(path: Path, number: int, line: bytes) -> dict[str, Any]:
    where = f"{path}, line {number}"
    if number == 1:
        line = line.removeprefix(b"\xef\xbb\xbf")  # written by editors on Windows
    try:
        record = parse_json(line.rstrip(b"\r\n"), most_bytes=MAX_LINE_BYTES)
    except BadJson as error:
        raise UserError(
            f"{where}: not JSON ({error}); expected one object a line; correct it"
        ) from error
    if not isinstance(record, dict):
        kind = type(record).__name__
        raise UserError(f"{where}: a JSON {kind}; expected an object {{...}}; correct the line")
    return record
