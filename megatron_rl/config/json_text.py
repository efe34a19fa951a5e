"""The one reader of JSON that others wrote, in files and in servers' answers, with its bounds.

Its values hold only text that UTF-8 can encode and numbers that fit a float, so later code cannot
fail on their size. No torch, no NumPy.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, NoReturn

from megatron_rl.errors import UserError
from megatron_rl.files import read_bounded

#: Default limit of a text, bytes.
MOST_BYTES = 16 << 20
#: Deepest nesting. Python's own limit would only show later, in code that uses the values.
MOST_LEVELS = 64
#: Most digits of an integer: such an integer also fits a float, and can be printed.
MOST_DIGITS = 300


class BadJson(ValueError):
    """A text that is no JSON, or out of bounds; the message is one line and omits the text."""


def parse_json(
    data: bytes | str, *, most_bytes: int = MOST_BYTES, most_levels: int = MOST_LEVELS
) -> Any:
    """The value of a JSON text (RFC 8259).

    Args:
        data: bytes are UTF-8, without a byte-order mark.
        most_bytes: longest text, in bytes (of a ``str``: characters).
        most_levels: deepest nesting of lists and objects.

    Raises:
        BadJson: the text is too long or too deep; it is no UTF-8 or no JSON; it holds NaN, an
            infinity, a number too large for a float, an integer of more than `MOST_DIGITS` digits,
            a key twice in an object, or half a surrogate pair.
    """
    if len(data) > most_bytes:
        raise BadJson(f"longer than {most_bytes:,} bytes")
    try:
        text = data if isinstance(data, str) else data.decode("utf-8")
        value = _DECODER.decode(text)
        if "\\ud" in text or "\\uD" in text or isinstance(data, str):
            _check_characters(text, value)
    except UnicodeDecodeError as error:
        raise BadJson(f"byte {error.start + 1} is not UTF-8") from None
    except json.JSONDecodeError as error:
        raise BadJson(f"{error.msg}, line {error.lineno}, column {error.colno}") from None
    except RecursionError:
        raise BadJson(f"nested more than {most_levels} deep") from None
    if text.count("[") + text.count("{") > most_levels and _is_deeper(value, most_levels):
        raise BadJson(f"nested more than {most_levels} deep")
    return value


def read_json_object(file: Path, expected: str, most_bytes: int = MOST_BYTES) -> dict[str, Any]:
    """The object a JSON file holds.

    ``expected``: the expected file, for the message. Raises UserError for a file that cannot be
    read, is no regular file, is too large, holds no object, or that `parse_json` refuses.
    """
    try:
        value = parse_json(read_bounded(file, most_bytes), most_bytes=most_bytes)
    except OSError as error:
        raise UserError(f"cannot read {file} ({error.strerror}); expected {expected}") from error
    except BadJson as error:
        raise UserError(f"{file}: not valid JSON ({error}); expected {expected}") from error
    if not isinstance(value, dict):
        raise UserError(f"{file}: found a {type(value).__name__}; expected a JSON object")
    return value


def _integer(text: str) -> int:
    digits = len(text.lstrip("-"))
    if digits > MOST_DIGITS:
        raise BadJson(f"an integer of {digits:,} digits, more than {MOST_DIGITS}")
    return int(text)


def _float(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise BadJson(f"the number {text[:40]}, too large for a float")
    return value


def _no_constant(name: str) -> NoReturn:
    raise BadJson(f"{name}, which is no JSON")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise BadJson(f"the key {ascii(key[:40])} twice in an object")
            seen.add(key)
    return found


_DECODER = json.JSONDecoder(
    object_pairs_hook=_object,
    parse_int=_integer,
    parse_float=_float,
    parse_constant=_no_constant,
)


def _check_characters(text: str, value: Any) -> None:
    """Refuse half a surrogate pair: no file can hold it, no tokenizer takes it."""
    try:
        text.encode("utf-8")
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        half = f"\\u{ord(error.object[error.start]):04x}"
        raise BadJson(f"{half} is half a surrogate pair and no character") from None


def _is_deeper(value: Any, limit: int) -> bool:
    level = [value]
    for _ in range(limit):
        inner = (v for v in level if isinstance(v, (dict, list)))
        level = [
            x
            for v in inner
            for x in (v.values() if isinstance(v, dict) else v)
            if isinstance(x, (dict, list))
        ]
        if not level:
            return False
    return True
