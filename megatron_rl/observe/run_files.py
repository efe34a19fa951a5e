"""Reading and cutting the JSONL files of a run directory."""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_rl.config.json_text import BadJson, parse_json
from megatron_rl.errors import UserError
from megatron_rl.files import write_whole

#: No run has more.
MOST_STEPS = 1 << 53
METRICS_FILE = "metrics.jsonl"
SAMPLES_FILE = "samples.jsonl"
EVALUATED = "eval/problems"  #: a metric of every evaluation


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSONL file whose every object has a ``step``, an integer from 0.

    A last line that is not complete JSON (the writer was killed) is left out. UserError: any
    other line is not an object.
    """
    lines = [line for line in path.read_bytes().split(b"\n") if line.strip()]
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = parse_json(line)
        except BadJson:
            if number == len(lines):
                break
            record = None
        step = record.get("step") if isinstance(record, dict) else None
        if type(step) is not int or not 0 <= step < MOST_STEPS:
            raise UserError(
                f"{path} line {number} holds {line[:60].decode(errors='replace')!r}; expected a "
                f"JSON object with an integer "
                f"'step'; delete that line"
            )
        records.append(record)
    return records


def drop_after(path: Path, step: int) -> int | None:
    """Drop the records with a step above ``step``, and a torn last line; the last step left,
    None where none is.

    The file is cut where the first of them begins, which needs no room on the disk. If records
    that stay follow that place, or the last line has no newline, the file is replaced in one
    rename. A crash leaves the old file or the new one. A missing file stays missing. OSError: it is
    no regular file (reading a pipe would block).
    """
    if not path.exists():
        return None
    if not path.is_file():
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    records, content = read_jsonl(path), path.read_bytes()
    kept = [record for record in records if record["step"] <= step]
    lines = [line + b"\n" for line in content.split(b"\n") if line.strip()][: len(kept)]
    whole = b"".join(lines)
    if kept == records[: len(kept)] and content.startswith(whole):
        os.truncate(path, len(whole))
    else:
        write_whole(path, "".join(to_json_line(record) for record in kept))
    return max((record["step"] for record in kept), default=None)


def last_evaluated(run_dir: Path, step: int) -> bool | None:
    """Whether the record of a step holds an evaluation; None where there is no such record.

    UserError: a line that is not the last is no object.
    """
    path = run_dir / METRICS_FILE
    records = read_jsonl(path) if path.is_file() else []
    found = [EVALUATED in record for record in records if record["step"] == step]
    return found[-1] if found else None


def to_json_line(record: Mapping[str, Any]) -> str:
    """One line of strict JSON; NaN and infinities, which JSON cannot hold, become null at any
    depth."""
    return json.dumps(_finite(record), ensure_ascii=False, allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value
