"""Values of tables and of users' code -> JSON values, within the bounds of
`config/json_text.py`.
"""

from __future__ import annotations

import datetime
import decimal
import math
from typing import Any, Mapping

from megatron_rl.config.json_text import MOST_DIGITS, MOST_LEVELS
from megatron_rl.errors import UserError, printable

_INTEGERS = 10**MOST_DIGITS


def plain_record(record: Any) -> dict[str, Any]:
    """A record as a mapping of JSON values.

    Dates and times become text, decimals numbers, tuples lists. Raises ``UserError``, without the
    place: it is no mapping with text keys; it holds bytes, a number that is not finite or has more
    than `MOST_DIGITS` digits, half a surrogate pair, or another value without a JSON form; it is
    nested more than `MOST_LEVELS` deep.
    """
    if not isinstance(record, Mapping):
        raise UserError(
            f"a record is of type {type(record).__name__}; expected a mapping of columns; "
            "correct the source"
        )
    return {
        _key(key, "the record"): _plain(value, printable(str(key), 60), 1)
        for key, value in record.items()
    }


def _key(key: Any, where: str) -> str:
    if not isinstance(key, str):
        raise UserError(
            f"{where} has the key {printable(repr(key), 60)}; expected text; correct the source"
        )
    return _text(key, where)


def _plain(value: Any, where: str, level: int) -> Any:
    """The JSON value; ``where``: its column."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return _text(value, where)
    if isinstance(value, (int, float, decimal.Decimal)):
        return _number(value, where)
    if isinstance(value, (datetime.date, datetime.time)):
        return value.isoformat()
    if isinstance(value, (Mapping, list, tuple)):
        if level >= MOST_LEVELS:
            raise UserError(
                f"{where!r} is nested more than {MOST_LEVELS} deep; expected less; leave it out"
            )
        if isinstance(value, Mapping):
            return {_key(k, repr(where)): _plain(v, where, level + 1) for k, v in value.items()}
        return [_plain(item, where, level + 1) for item in value]
    tolist = getattr(value, "tolist", None)  # a number or an array of NumPy
    if callable(tolist) and type(value).__module__ == "numpy":
        return _plain(tolist(), where, level)
    raise UserError(
        f"{where!r} holds a value of type {type(value).__name__}; expected text, numbers, true or "
        "false, null, lists and mappings; leave the column out"
    )


def _number(value: int | float | decimal.Decimal, where: str) -> int | float:
    finite = isinstance(value, int) or (
        value.is_finite() if isinstance(value, decimal.Decimal) else math.isfinite(value)
    )
    if isinstance(value, decimal.Decimal) and finite:
        # not int() of every value: 1e999999 has a million digits
        whole = abs(value.adjusted()) < MOST_DIGITS and value == value.to_integral_value()
        value = int(value) if whole else float(value)
        finite = isinstance(value, int) or math.isfinite(value)
    if not finite or (isinstance(value, int) and abs(value) >= _INTEGERS):
        found = "a number too large" if finite else value
        raise UserError(
            f"{where!r} holds {found}; expected a finite number "
            f"of at most {MOST_DIGITS} digits; correct it or leave the column out"
        )
    return int(value) if isinstance(value, int) else float(value)


def _text(value: str, where: str) -> str:
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise UserError(
            f"{where!r} holds half a surrogate pair, which is no character; correct the text"
        ) from None
    return str(value)
