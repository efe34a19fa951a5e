"""Prompt templates: text with columns in braces."""

from __future__ import annotations

import json
import re
from typing import Any, Callable

from megatron_rl.errors import UserError, printable

#: A double brace, a column in braces, or a brace that is neither.
_BRACES = re.compile(r"\{\{|\}\}|\{([^{}\n]+)\}|[{}]")


def fill(template: str, value_of: Callable[[str], Any]) -> str:
    """Fill in each column's value: text as it is, other values as JSON.

    Args:
        template: "Problem: {question}"; ``{{`` and ``}}`` are braces.
        value_of: gives a column's value, or raises `UserError`.

    Raises:
        UserError: a column is null, or ``value_of`` raises.
    """

    def text(found: re.Match[str]) -> str:
        name = found[1]
        if name is None:
            return found[0][0]
        value = value_of(name)
        if value is None:
            raise UserError(
                f"{name!r} is null and stands in the template; expected text; correct the line"
            )
        return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)

    return _BRACES.sub(text, template)


def check_template(template: str, field: str) -> None:
    """Raise UserError for a single brace, or a text without a column."""
    found = _BRACES.findall(template)
    alone = next((m[0] for m in _BRACES.finditer(template) if m[0] in "{}"), None)
    if alone is not None or not any(found):
        what = f"a single {alone!r} in it" if alone is not None else "no column in it"
        raise UserError(
            f"{field} is {printable(repr(template))}, with {what}; expected columns in braces, "
            'such as "Problem: {question}"; double a brace that is meant as one'
        )
