"""Compares an answer with the reference, by the reference's kind (README.md has the rules)."""

from __future__ import annotations

import re
from dataclasses import replace
from fractions import Fraction
from functools import lru_cache
from typing import Sequence

from megatron_rl.rewards.answers.algebra import Tree, symbols
from megatron_rl.rewards.answers.equal import (
    Judge,
    is_number,
    real_value,
    same_expression,
    same_number,
)
from megatron_rl.rewards.answers.evaluate import modular
from megatron_rl.rewards.answers.kinds import (
    Answer,
    Brackets,
    Collection,
    Expression,
    Matrix,
    Number,
    Quantity,
    Ratio,
    Relation,
)
from megatron_rl.rewards.answers.read import read_answer
from megatron_rl.rewards.answers.text import clean

#: Characters; longer answers are compared as text. It bounds time, memory and recursion.
MAX_ANSWER_CHARACTERS = 256
_INFINITY = Expression(("const", "inf"))
_MINUS_INFINITY = Expression(("neg", ("const", "inf")))
_CHOICE = re.compile(r"\(?\s*([A-J])\s*\)?[.:]?")
_CHOICE_AND_TEXT = re.compile(r"(?:\(([A-J])\)[.:]?|([A-J])[.):])\s*(\S.*)")


def is_same_answer(expected: str, answer: str, judge: Judge) -> bool:
    """Whether an answer's text equals the reference's text in meaning."""
    one, other = _cleaned(expected), clean(answer)
    if _squeezed(one) == _squeezed(other):
        return True
    if max(len(one), len(other)) > MAX_ANSWER_CHARACTERS:
        return False
    choice = _CHOICE.fullmatch(one)
    if choice is not None and _chosen(other) is not None:
        return _chosen(other) == choice.group(1)
    return _same(_read_reference(one), read_answer(other), judge)


def is_restated(expected: str, answer: str, problem: Sequence[str]) -> bool:
    """Whether a right answer repeats a formula of the problem's text, like 2^{10} in "Compute
    2^{10}".
    """
    formula = read_answer(clean(answer))
    if not isinstance(formula, Expression) or formula == _read_reference(_cleaned(expected)):
        return False
    said = "".join(clean(answer).split())
    return any(said in "".join(clean(text).split()) for text in problem)


#: A reference is compared with every answer of its group.
_cleaned = lru_cache(maxsize=1024)(clean)
_read_reference = lru_cache(maxsize=1024)(read_answer)


def _squeezed(text: str) -> str:
    """The text without spaces that separate nothing."""
    return re.sub(r"(?<![^\W_]) | (?![^\W_])", "", text)


def _chosen(text: str) -> str | None:
    text = re.sub(r"\\text\{([^{}]*)\}", r"\1", text).strip()
    match = _CHOICE.fullmatch(text) or _CHOICE.fullmatch(text.upper())
    if match is not None:
        return match.group(1)
    match = _CHOICE_AND_TEXT.fullmatch(text)
    if match is None or re.search(r"\b[A-J]\b", match.group(3)):
        return None
    return match.group(1) or match.group(2)


def _same(expected: Answer, answer: Answer, judge: Judge, finished: bool = True) -> bool:
    """``finished``: the answer must be worked out as far as the reference."""
    if isinstance(expected, Relation):
        return _same_relation(expected, answer, judge)
    if isinstance(answer, Relation):
        return _claims(expected, answer, judge)
    if isinstance(expected, Quantity) or isinstance(answer, Quantity):
        return _same_quantity(expected, answer, judge, finished)
    if isinstance(expected, Number):
        return is_number(expected, answer, finished)
    if isinstance(expected, Expression):
        return same_expression(expected.tree, answer, judge)
    if isinstance(expected, Collection):
        return isinstance(answer, Collection) and _same_collection(expected, answer, judge)
    if isinstance(expected, Brackets):
        return _same_brackets(expected, answer, judge)
    if isinstance(expected, Ratio):
        return isinstance(answer, Ratio) and _pairwise(expected.items, answer.items, judge)
    if isinstance(expected, Matrix):
        return (
            isinstance(answer, Matrix)
            and expected.kind == answer.kind
            and len(expected.rows) == len(answer.rows)
            and all(_pairwise(one, two, judge) for one, two in zip(expected.rows, answer.rows))
        )
    return expected == answer


def _pairwise(expected: Sequence[Answer], answer: Sequence[Answer], judge: Judge) -> bool:
    return len(expected) == len(answer) and all(
        _same(one, other, judge) for one, other in zip(expected, answer)
    )


# -- quantities ---------------------------------------------------------------------------------


def _same_quantity(expected: Answer, answer: Answer, judge: Judge, finished: bool) -> bool:
    """Units agree, or one side has none; "5 thousand" is 5000, 20% is 20 and 0.2."""
    one, other = _without_unit(expected), _without_unit(answer)
    if one is None or other is None:
        return False
    if isinstance(expected, Quantity) and isinstance(answer, Quantity):
        if expected.unit.dimension != answer.unit.dimension:
            return False
        if expected.unit.factor != answer.unit.factor:
            if not isinstance(one, Number) or not isinstance(other, Number):
                return False
            return same_number(
                _scaled(one, expected.unit.factor), _scaled(other, answer.unit.factor)
            )
        return _same(one, other, judge, finished)
    if isinstance(expected, Number) and abs(expected.value) < 1 and _is_percent(answer):
        pass  # a share: 0.5 is 50%, not 0.5%
    elif _same(one, other, judge, finished):
        return True
    if _is_percent(expected) and isinstance(one, Number):
        return _same(_scaled(one, Fraction(1, 100)), other, judge, finished)
    if _is_percent(answer) and isinstance(other, Number):
        return _same(one, _scaled(other, Fraction(1, 100)), judge, finished)
    return False


def _without_unit(answer: Answer) -> Answer | None:
    if not isinstance(answer, Quantity):
        return answer
    if answer.unit.multiplier == 1:
        return answer.value
    if not isinstance(answer.value, Number):
        return None
    return _scaled(answer.value, answer.unit.multiplier)


def _is_percent(answer: Answer) -> bool:
    return isinstance(answer, Quantity) and answer.unit.dimension == (("percent", 1),)


def _scaled(number: Number, factor: Fraction) -> Number:
    return replace(number, value=number.value * factor, half=number.half * factor)


# -- several values -----------------------------------------------------------------------------


def _same_collection(expected: Collection, answer: Collection, judge: Judge) -> bool:
    """The same items in any order; a list may be written as a set."""
    if (expected.kind == "union") != (answer.kind == "union"):
        return False
    if len(expected.items) != len(answer.items):
        return False
    names = [_defined(item) for item in answer.items]
    if len(set(names) - {None}) > 1:  # x = 2, y = 3 names each value
        wanted = [_defined(item) for item in expected.items]
        if set(wanted) == {None}:
            return _pairwise(expected.items, answer.items, judge)
        if sorted(map(str, wanted)) != sorted(map(str, names)):
            return False
    elif len({_defined(item) for item in expected.items} - {None}) > 1:
        return False
    left = list(answer.items)
    for item in expected.items:
        found = next((other for other in left if _same(item, other, judge)), None)
        if found is None:
            return False
        left.remove(found)
    return True


def _same_brackets(expected: Brackets, answer: Answer, judge: Judge) -> bool:
    if isinstance(answer, Collection) and answer.kind == "list":
        values = {_defined(item): item for item in answer.items}
        if None in values or len(values) != len(answer.items) or expected.opening != "(":
            return False
        items = [item for _, item in sorted(values.items())]  # x = 1, y = 2 is the point (1, 2)
        return expected.closing == ")" and _pairwise(expected.items, items, judge)
    return (
        isinstance(answer, Brackets)
        and (expected.opening, expected.closing) == (answer.opening, answer.closing)
        and _pairwise(expected.items, answer.items, judge)
    )


# -- relations ----------------------------------------------------------------------------------


def _bare(answer: Answer) -> str | None:
    """The name of a lone variable."""
    if isinstance(answer, Expression) and answer.tree[0] == "sym":
        return answer.tree[1]
    return None


def _defined(answer: Answer) -> str | None:
    """x of "x = value", else None."""
    if isinstance(answer, Relation) and set(answer.signs) <= {"=", "~"}:
        return _bare(answer.sides[0])
    return None


def _claims(expected: Answer, answer: Relation, judge: Judge) -> bool:
    """An answer such as "x = 5", "1/3 = 0.333..." or "1 < x < 2" where the reference is a value."""
    signs, sides = list(answer.signs), list(answer.sides)
    if not set(signs) <= {"=", "~"}:
        if signs == ["in"] and _bare(sides[0]) is not None:
            return isinstance(expected, (Brackets, Collection)) and _same(expected, sides[1], judge)
        interval = _interval(answer)
        return interval is not None and _same(expected, interval, judge)
    answer = _name_first(answer)
    sides = list(answer.sides)
    name = _bare(sides[0])
    if name is not None:
        if isinstance(expected, Expression) and name in symbols(expected.tree):
            return False
        del signs[0], sides[0]
    return _same_chain(expected, sides, signs, judge)


def _same_chain(
    expected: Answer, sides: Sequence[Answer], signs: Sequence[str], judge: Judge
) -> bool:
    """Whether all sides equal the reference and the last is worked out; sides after "approx" are
    roundings.
    """
    border = signs.index("~") + 1 if "~" in signs else len(sides)
    claims, roundings = sides[:border], sides[border:]
    if any(isinstance(side, Relation) for side in sides):
        return False
    if not all(_same(expected, side, judge, finished=False) for side in claims[:-1]):
        return False
    return _same(expected, claims[-1], judge) and all(
        _is_rounding(claims[-1], side) for side in roundings
    )


def _is_rounding(value: Answer, rounded: Answer) -> bool:
    value = value.value if isinstance(value, Quantity) else value
    rounded = rounded.value if isinstance(rounded, Quantity) else rounded
    if not isinstance(rounded, Number):
        return False
    if isinstance(value, Number):
        true = value.value
    else:
        approximate = real_value(value.tree) if isinstance(value, Expression) else None
        if approximate is None:
            return False
        true = Fraction(approximate)
    return abs(true - rounded.value) <= (rounded.half or Fraction(1, 2))


def _same_relation(expected: Relation, answer: Answer, judge: Judge) -> bool:
    expected = _name_first(expected)
    if isinstance(answer, Relation):
        answer = _name_first(answer)
    if set(expected.signs) == {"in"} and len(expected.sides) == 2:
        return _same(expected.sides[1], answer, judge)
    if set(expected.signs) - {"=", "~"}:
        return _same_inequality(expected, answer, judge)
    name = _bare(expected.sides[0])
    if name is not None and len(expected.sides) == 2:
        if not isinstance(answer, Relation):
            return _same(expected.sides[1], answer, judge)
        if _defined(answer) == name:
            return _same_chain(expected.sides[1], answer.sides[1:], answer.signs[1:], judge)
    if not isinstance(answer, Relation) or (expected.signs, answer.signs) != (("=",), ("=",)):
        return False
    return (
        _same_equation(expected, answer)
        or _pairwise(expected.sides, answer.sides, judge)
        or _pairwise(expected.sides, answer.sides[::-1], judge)
    )


def _name_first(relation: Relation) -> Relation:
    """x = 5 of 5 = x."""
    if relation.signs == ("=",) and _bare(relation.sides[1]) and not _bare(relation.sides[0]):
        return Relation(relation.sides[::-1], relation.signs)
    return relation


def _same_equation(expected: Relation, answer: Relation) -> bool:
    """Whether one is a multiple of the other, like 2x = y + 1 of y + 1 - 2x = 0; not x - 5 = 0 of x
    = 5.
    """
    trees = []
    for relation in (expected, answer):
        sides = [_tree(side) for side in relation.sides]
        if None in sides:
            return False
        trees.append(("add", sides[0], ("neg", sides[1])))
    if symbols(trees[0]) != symbols(trees[1]) or len(symbols(trees[0])) < 2:
        return False
    ratios = set()
    for seed in range(3):
        one, other = modular(trees[0], seed), modular(trees[1], seed)
        if not one or not other:
            return False
        ratios.add(modular(("div", ("num", str(one)), ("num", str(other))), seed))
    return len(ratios) == 1


def _tree(answer: Answer) -> Tree | None:
    if isinstance(answer, Number):
        return ("num", str(answer.value))
    return answer.tree if isinstance(answer, Expression) else None


_FLIPPED = {"<": ">", ">": "<", "<=": ">=", ">=": "<=", "!=": "!="}


def _same_inequality(expected: Relation, answer: Answer, judge: Judge) -> bool:
    interval = _interval(expected)
    if not isinstance(answer, Relation):
        return interval is not None and _same(interval, answer, judge)
    other = _interval(answer)
    if interval is not None and other is not None:
        return _variable(expected) == _variable(answer) and _same(interval, other, judge)
    flipped = tuple(_FLIPPED.get(sign, sign) for sign in reversed(answer.signs))
    return (expected.signs == answer.signs and _pairwise(expected.sides, answer.sides, judge)) or (
        expected.signs == flipped and _pairwise(expected.sides, answer.sides[::-1], judge)
    )


def _variable(relation: Relation) -> str | None:
    return next((name for side in relation.sides if (name := _bare(side)) is not None), None)


def _interval(relation: Relation) -> Brackets | None:
    """The interval of "x < 5" or "1 <= x < 2"; None for any other relation."""
    sides, signs = relation.sides, relation.signs
    if signs[0] in (">", ">="):
        sides, signs = sides[::-1], tuple(_FLIPPED.get(sign, sign) for sign in reversed(signs))
    if not set(signs) <= {"<", "<="} or len(sides) > 3:
        return None
    position = [_bare(side) is not None for side in sides]
    if sum(position) != 1 or len(sides) == 3 and not position[1]:
        return None
    at = position.index(True)
    if any(symbols(_tree(side) or ("sym", "?")) for side in sides if _bare(side) is None):
        return None
    low, high = (sides[0] if at else _MINUS_INFINITY), (sides[-1] if at < len(sides) - 1 else None)
    opening = "[" if at and signs[0] == "<=" else "("
    closing = "]" if high is not None and signs[at] == "<=" else ")"
    return Brackets(opening, (low, high or _INFINITY), closing)
