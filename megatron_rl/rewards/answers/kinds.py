"""The kinds of answers."""

from __future__ import annotations

import datetime
from dataclasses import dataclass
from fractions import Fraction
from typing import Union

from megatron_rl.rewards.answers.algebra import Tree
from megatron_rl.rewards.answers.units import Unit


@dataclass(frozen=True)
class Words:
    """Text that is not mathematics: compared without case and white space."""

    folded: str


@dataclass(frozen=True)
class Number:
    """An integer, fraction, mixed number or decimal that is written out.

    ``digits``: significant digits of a decimal; None for what is exact by its form. ``half``: half
    a unit of its last digit.
    """

    value: Fraction
    digits: int | None = None
    half: Fraction = Fraction(0)


@dataclass(frozen=True)
class Expression:
    """Algebra that is more than a number."""

    tree: Tree


@dataclass(frozen=True)
class Quantity:
    """A value with a unit, which may be a currency or "%"."""

    value: "Answer"
    unit: Unit


@dataclass(frozen=True)
class Numeral:
    """Digits in a base other than ten."""

    digits: str
    base: int


@dataclass(frozen=True)
class Date:
    """A day of the calendar."""

    day: datetime.date


@dataclass(frozen=True)
class Brackets:
    """Items between brackets: a point, tuple, interval or vector."""

    opening: str
    items: tuple["Answer", ...]
    closing: str


@dataclass(frozen=True)
class Collection:
    """Several values in any order. ``kind``: set, list, union (of intervals)."""

    kind: str
    items: tuple["Answer", ...]


@dataclass(frozen=True)
class Ratio:
    """a : b, of numbers or expressions."""

    items: tuple["Answer", ...]


@dataclass(frozen=True)
class Matrix:
    """Rows of a matrix; ``kind``: matrix or vmatrix (a determinant)."""

    kind: str
    rows: tuple[tuple["Answer", ...], ...]


@dataclass(frozen=True)
class Relation:
    """side, sign, side...; ``names``: what each side's text is, to tell a bare variable."""

    sides: tuple["Answer", ...]
    signs: tuple[str, ...]


Answer = Union[
    Words,
    Number,
    Expression,
    Quantity,
    Numeral,
    Date,
    Brackets,
    Collection,
    Ratio,
    Matrix,
    Relation,
]
