"""JSON files that others wrote: read with bounds, so that none hangs or ends in a traceback."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

from megatron_rl.errors import UserError

#: Largest file read where a caller says nothing else, bytes.
MOST_BYTES = 16 << 20
#: Deepest nesting. Python's own limit is reached in the middle of whatever looks at the values.
MOST_LEVELS = 64


def read_json_object(file: Path, expected: str, most_bytes: int = MOST_BYTES) -> dict[str, Any]:
    """The object a JSON file holds.

    ``expected``: what the file should have been, for the message. Raises UserError for a file that
    cannot be read, is no regular file, is too large, is no JSON, holds an integer of thousands of
    digits, is nested too deeply, or holds no object.
    """
    try:
        status = file.stat()
        if not stat.S_ISREG(status.st_mode):  # reading a pipe would wait for a writer
            raise UserError(f"cannot read {file} (not a regular file); expected {expected}")
        size = status.st_size
        if size > most_bytes:
            raise UserError(
                f"{file} has {size:,} bytes; expected {expected}, of at most {most_bytes:,}"
            )
        values = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {file} ({error.strerror}); expected {expected}") from error
    except RecursionError as error:
        raise UserError(f"{file}: nested too deeply; expected {expected}") from error
    except ValueError as error:  # not JSON, not UTF-8, or a number of too many digits
        raise UserError(f"{file}: not valid JSON ({error}); expected {expected}") from error
    if not isinstance(values, dict):
        raise UserError(f"{file}: found a {type(values).__name__}; expected a JSON object")
    if _levels_exceed(values, MOST_LEVELS):
        raise UserError(f"{file}: nested more than {MOST_LEVELS} deep; expected {expected}")
    return values


def _levels_exceed(value: Any, limit: int) -> bool:
    level = [value]
    for _ in range(limit):
        inner = (v for v in level if isinstance(v, (dict, list)))
        level = [x for v in inner for x in (v.values() if isinstance(v, dict) else v)]
        if not level:
            return False
    return any(isinstance(v, (dict, list)) for v in level)
