"""Answers that are written out: numbers, numerals of a base, dates."""

from __future__ import annotations

import datetime
import re
from fractions import Fraction
from typing import Sequence

from megatron_rl.rewards.answers.algebra import Tree
from megatron_rl.rewards.answers.kinds import Date, Number, Numeral
from megatron_rl.rewards.answers.text import fold_words
from megatron_rl.rewards.answers.tokens import Token, is_symbol, number_value

_PLAIN = re.compile(
    r"([-+]?)\s?(\d{1,3}(?:,\d{3})+(?!\d)|\d+)?(\.\d+)?(?:[eE]([-+]?\d{1,3}))?", re.ASCII
)
_REPEATING = re.compile(r"(-?)(\d*)\.(\d*)\\overline\s*\{(\d+)\}", re.ASCII)
_QUOTIENT = re.compile(r"(-?)\s*(\d+)\s*/\s*(\d+)", re.ASCII)
_FRACTION = re.compile(r"(-?) ?\\frac\{(\d+)\}\{(\d+)\}", re.ASCII)
_ISO_DATE = re.compile(r"(\d{4})-(\d{1,2})-(\d{1,2})", re.ASCII)
SLASH_DATE = re.compile(r"\d{1,4}/\d{1,2}/\d{1,4}", re.ASCII)
_MONTHS = "january february march april may june july august september october november december"
_MONTH_DATE = re.compile(
    r"(?:(\d{1,2})(?:st|nd|rd|th)? (?:of )?)?([a-z]{3,9})\.?"
    r"(?: (\d{1,2})(?:st|nd|rd|th)?)?,? (\d{4})"
)
_NUMERAL = re.compile(
    r"\(?([0-9A-Za-z]+)\)? ?(?:_ ?\{? ?\(?([0-9a-z]+)\)? ?\}?|base[- ]([0-9a-z]+))"
)
_TEXT = re.compile(r"\\text\{ ?([^{}]*?) ?\}")
_BASES = {
    name: index
    for index, name in enumerate(
        "two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
        "sixteen".split(),
        start=2,
    )
}


def plain_number(text: str) -> Number | None:
    """An integer, decimal, fraction of integers, or one like 1e-05; None for anything else."""
    match = _PLAIN.fullmatch(text)
    if match is not None and (match.group(2) or match.group(3)):
        sign, whole, decimals, exponent = match.groups()
        digits = (whole or "").replace(",", "") + (decimals or "")[1:]
        return decimal_number(sign, digits, len(decimals or ".") - 1, int(exponent or 0), exponent)
    match = _REPEATING.fullmatch(text)
    if match is not None and len(text) < 64:
        sign, whole, once, again = match.groups()
        part = Fraction(int(again), 10 ** len(again) - 1) / 10 ** len(once)
        value = Fraction(f"{whole or 0}.{once or 0}") + part
        return Number(-value if sign else value)
    match = _QUOTIENT.fullmatch(text) or _FRACTION.fullmatch(text)
    if match is not None and int(match.group(3)):
        value = Fraction(int(match.group(2)), int(match.group(3)))
        return Number(-value if match.group(1) else value)
    return None


def decimal_number(
    sign: str, digits: str, decimals: int, exponent: int, scientific: object = None
) -> Number:
    """The number with these digits, of which the last ``decimals`` follow the point."""
    unit = Fraction(10) ** (exponent - decimals)
    value = int(digits) * unit
    exact = decimals == 0 and not scientific
    return Number(
        -value if sign == "-" else value,
        None if exact else max(len(digits.lstrip("0")), 1),
        Fraction(0) if exact else unit / 2,
    )


def read_numeral(text: str) -> Numeral | Number | None:
    """101_2 or "101 base two"; a number if the base is ten."""
    if "_" not in text and "base" not in text:
        return None
    match = _NUMERAL.fullmatch(_TEXT.sub(r"\1", text).strip())
    if match is None or not re.search("[0-9]|^[A-Z]+$", match.group(1)):
        return None  # x_1
    name = match.group(2) or match.group(3)
    base = int(name) if name.isdigit() and len(name) < 4 else _BASES.get(name)
    if base is None or not 2 <= base <= 36:
        return None
    digits = match.group(1).upper().lstrip("0") or "0"
    if base == 10 and digits.isdigit():
        return Number(Fraction(int(digits)))
    if any(int(digit, 36) >= base for digit in digits):
        return None
    return Numeral(digits, base)


def read_date(text: str) -> Date | None:
    """2023-05-06, May 6, 2023, or 6 May 2023."""
    match = _ISO_DATE.fullmatch(text)
    if match is not None:
        year, month, day = map(int, match.groups())
        return _calendar(year, month, day)
    match = _MONTH_DATE.fullmatch(fold_words(text)) if text[-4:].isdigit() else None
    if match is None or (match.group(1) is None) == (match.group(3) is None):
        return None
    months = [
        index
        for index, name in enumerate(_MONTHS.split(), start=1)
        if match.group(2) in (name, name[:3])
    ]
    day = int(match.group(1) or match.group(3))
    return _calendar(int(match.group(4)), months[0], day) if months else None


def _calendar(year: int, month: int, day: int) -> Date | None:
    try:
        return Date(datetime.date(year, month, day))
    except ValueError:
        return None


def literal_number(tree: Tree, tokens: Sequence[Token]) -> Number | None:
    """The number that a tree writes out: digits, a fraction, a mixed number, 2 * 10^n."""
    if tree[0] == "neg":
        number = literal_number(
            tree[1], [token for token in tokens if not is_symbol(token, "+", "-")]
        )
        return None if number is None else Number(-number.value, number.digits, number.half)
    kinds = [node[0] for node in tree[1:] if isinstance(node, tuple)]
    if tree[0] == "num":
        texts = [token.text for token in tokens if token.kind == "number"]
        return plain_number(texts[0]) if len(texts) == 1 else None
    if tree[0] == "div" and kinds == ["num", "num"]:
        return _quotient(tree)
    if tree[0] == "div" and kinds == ["neg", "num"] and tree[1][1][0] == "num":
        number = _quotient(("div", tree[1][1], tree[2]))
        return None if number is None else Number(-number.value)
    if tree[0] == "mixed" and kinds == ["num", "div"]:
        part = _quotient(tree[2])
        return None if part is None else Number(Fraction(tree[1][1]) + part.value)
    return _scientific(tree, tokens)


def _quotient(tree: Tree) -> Number | None:
    above, below = Fraction(tree[1][1]), Fraction(tree[2][1])
    if below == 0 or above.denominator != 1 or below.denominator != 1:
        return None
    return Number(above / below)


def _scientific(tree: Tree, tokens: Sequence[Token]) -> Number | None:
    mantissa, power = tree[1:] if tree[0] == "mul" else (("num", "1"), tree)
    if mantissa[0] != "num" or power[0] != "pow" or power[1] != ("num", "10"):
        return None
    exponent = power[2]
    sign = -1 if exponent[0] == "neg" else 1
    exponent = exponent[1] if exponent[0] == "neg" else exponent
    if exponent[0] != "num" or not exponent[1].isdigit() or len(exponent[1]) > 3:
        return None
    scale = Fraction(10) ** (sign * int(exponent[1]))
    first = next(token.text for token in tokens if token.kind == "number")
    number = plain_number(first) if tree[0] == "mul" else Number(Fraction(1))
    if number is None or number.value != number_value(first) and tree[0] == "mul":
        return None
    digits = number.digits if number.digits is not None else 1
    return Number(number.value * scale, digits, number.half * scale)
