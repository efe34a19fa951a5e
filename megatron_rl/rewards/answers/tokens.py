"""Tokens of an answer's text."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import NamedTuple

_MAX_EXPONENT = 999


class Unreadable(ValueError):
    """The text does not have the requested form."""


class Token(NamedTuple):
    """``kind``: number, word, text, command or mark; ``spaced``: white space precedes it."""

    kind: str
    text: str
    spaced: bool


def is_symbol(token: Token, *texts: str) -> bool:
    """Whether it is one of these marks or commands."""
    return token.kind in ("mark", "command") and token.text in texts


def is_word(token: Token, *words: str) -> bool:
    r"""Whether it is one of these words, with or without \text{...}."""
    return token.kind in ("text", "word") and token.text.strip().lower() in words


_TOKEN = re.compile(
    r"\s*(?:"
    r"(?P<number>(?:\d+(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d+(?![\d.]))?)"
    r"|\\text\{(?P<text>[^{}]*)\}"
    r"|(?P<word>[^\W\d_]+)"
    r"|\\(?P<command>[a-zA-Z]+)"
    r"|(?P<mark>\\[{}|$%\\&]|[<>]=|!=|\*\*|[^\s\w\\]|_)"
    r")"
)
_THOUSANDS = re.compile(r"\d{1,3}(?:,\d{3})+(?![\d])(?:\.\d+)?", re.ASCII)
_OPEN, _CLOSE = frozenset("([") | {"\\{", "langle"}, frozenset(")]") | {"\\}", "rangle"}


def tokenize(text: str) -> list[Token]:
    """The tokens of a cleaned text; ``Unreadable`` at text that is no token.

    "1,234" is one number, but inside brackets it is two.
    """
    tokens: list[Token] = []
    position, depth = 0, 0
    while position < len(text):
        match = _TOKEN.match(text, position)
        if match is None:
            if not text[position:].strip():
                break
            raise Unreadable(f"character {text[position]!a}")
        kind = match.lastgroup or ""
        value, spaced, start = match.group(kind), match.group()[:1].isspace(), match.start(kind)
        end = match.end()
        if kind == "number" and depth == 0:
            grouped = _THOUSANDS.match(text, start)
            if grouped is not None:
                value, end = grouped.group().replace(",", ""), grouped.end()
        depth += (value in _OPEN) - (value in _CLOSE)
        position = end
        if kind != "text" or value.strip():
            tokens.append(Token(kind, value, spaced))
    return tokens


def number_value(text: str) -> Fraction:
    """The exact value of a number's token; ``Unreadable`` if its exponent is too large."""
    mantissa, _, exponent = text.lower().partition("e")
    if exponent and (len(exponent) > 5 or abs(int(exponent)) > _MAX_EXPONENT):
        raise Unreadable("exponent")
    return Fraction(mantissa) * Fraction(10) ** int(exponent or 0)
