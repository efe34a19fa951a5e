"""Compares numbers and expressions.

Nothing here computes for long: if floating point does not refute an equality that only algebra can
confirm, the caller's judge decides.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Callable

from megatron_rl.rewards.answers.algebra import Tree, product_of_letters, symbols, walk
from megatron_rl.rewards.answers.evaluate import at_points, exact, is_rational_function, modular
from megatron_rl.rewards.answers.kinds import Answer, Expression, Number, Words

#: A decimal reference with this many significant digits equals any value that rounds to it.
REFERENCE_DIGITS = 3
#: A decimal answer with this many significant digits equals an exact value that rounds to it.
ANSWER_DIGITS = 6

#: Whether two trees are equal wherever both are real.
Judge = Callable[[Tree, Tree], bool]


# -- numbers ------------------------------------------------------------------------------------


def is_number(expected: Number, answer: Answer, finished: bool) -> bool:
    """Whether an answer is a number, written out or (unless ``finished`` is False) nearly so."""
    if isinstance(answer, Number):
        return same_number(expected, answer)
    if not isinstance(answer, Expression) or symbols(answer.tree):
        return False
    if finished and not _is_worked_out(answer.tree, expected.digits is not None):
        return False
    value = exact(answer.tree)
    if value is not None:
        return same_number(expected, Number(value))
    approximate = real_value(answer.tree)
    if approximate is None or (expected.digits or 0) < REFERENCE_DIGITS:
        return False
    return abs(Fraction(approximate) - expected.value) <= expected.half


def same_number(expected: Number, answer: Number) -> bool:
    """Whether two numbers are equal, or one is the other rounded to enough digits."""
    if expected.value == answer.value:
        return True
    if expected.digits is None and expected.value.denominator == 1:
        return False
    difference = abs(expected.value - answer.value)
    if (expected.digits or 0) >= REFERENCE_DIGITS and difference <= expected.half:
        return True
    return _stands_for(answer, expected.value)


def _stands_for(decimal: Number, value: Fraction) -> bool:
    """Whether a decimal of enough digits is a value rounded or cut off at its last digit."""
    if (decimal.digits or 0) < ANSWER_DIGITS:
        return False
    difference = abs(value) - abs(decimal.value)
    noise = abs(value) / 10**14  # of floating point
    return (
        value * decimal.value > 0 and -decimal.half - noise <= difference < 2 * decimal.half + noise
    )


def _is_worked_out(tree: Tree, sums: bool) -> bool:
    """Whether it is a closed form such as 2^10, 5! or sqrt(2)/2, without arithmetic left to do."""
    for node in walk(tree):
        if node[0] in ("fn", "log"):
            return False
        if node[0] == "add" and (not sums or all(exact(child) is not None for child in node[1:])):
            return False
        if node[0] == "mul" and sum(_is_literal(child) for child in node[1:]) > 1:
            return False
    return True


def _is_literal(tree: Tree) -> bool:
    while tree[0] == "neg":
        tree = tree[1]
    return tree[0] == "num" or tree[0] in ("div", "mixed") and all(map(_is_literal, tree[1:]))


def real_value(tree: Tree) -> float | None:
    """The real value of an expression without variables; None: it has none or is not real."""
    value = at_points(tree)[0]
    if value is None or abs(value.imag) > 1e-12 * max(1.0, abs(value)):
        return None
    return value.real


# -- algebra ------------------------------------------------------------------------------------


def same_expression(expected: Tree, answer: Answer, judge: Judge) -> bool:
    """Whether an answer equals an expression that is more than a number."""
    if isinstance(answer, Words) and len(answer.folded) <= 3:
        # "xy" is a product only where the reference is algebra in x and y
        if not answer.folded.isalpha() or set(answer.folded) != symbols(expected):
            return False
        return same_algebra(expected, product_of_letters(answer.folded), judge)
    if isinstance(answer, Expression):
        return same_algebra(expected, answer.tree, judge)
    if not isinstance(answer, Number) or symbols(expected):
        return False
    value = exact(expected)
    if value is not None:
        return same_number(Number(value), answer)
    approximate = real_value(expected)
    if approximate is None:
        return False
    if answer.digits is not None:
        return _stands_for(answer, Fraction(approximate))
    difference = abs(Fraction(approximate) - answer.value)
    return difference <= abs(answer.value) / 10**12 and judge(expected, ("num", str(answer.value)))


def same_algebra(expected: Tree, answer: Tree, judge: Judge) -> bool:
    """Whether they are equal as functions of the same variables, and the answer adds no
    function.
    """
    if expected == answer:
        return True
    if symbols(expected) != symbols(answer):
        return False
    allowed = _functions(expected) | {"abs"} if _has_root(expected) else _functions(expected)
    if not _functions(answer) <= allowed:
        return False
    if ("const", "inf") in (*walk(expected), *walk(answer)):
        return False
    values = [(modular(expected, seed), modular(answer, seed)) for seed in range(3)]
    known = [one == other for one, other in values if one is not None and other is not None]
    if len(known) > 1 and all(known):
        return True
    if not all(known) and is_rational_function(expected) and is_rational_function(answer):
        return False
    return not _differ(expected, answer) and judge(expected, answer)


_FAMILIES: dict[str, str] = {
    **dict.fromkeys(("sin", "cos", "tan", "cot", "sec", "csc"), "angle"),
    **dict.fromkeys(("asin", "acos", "atan"), "inverse"),
    **dict.fromkeys(("sinh", "cosh", "tanh"), "hyperbola"),
}


def _functions(tree: Tree) -> frozenset[str]:
    """Families of functions in the expression: an answer with one has left it to be worked out."""
    found: set[str] = set()
    for node in walk(tree):
        if node[0] == "fn" and node[1] != "ln":
            name: str = node[1]
            found.add(_FAMILIES.get(name, name))
        elif node[0] in ("log", "fn"):
            found.add("log")
    return frozenset(found)


def _has_root(tree: Tree) -> bool:
    """The root of a square is an absolute value."""
    return any(node[0] == "root" for node in walk(tree))


def _differ(expected: Tree, answer: Tree) -> bool:
    """Whether they differ at a point where both are real, or share no such point."""
    imaginary = ("const", "i") in (*walk(expected), *walk(answer))
    compared = 0
    for one, other in zip(at_points(expected), at_points(answer)):
        if one is None or other is None:
            continue
        size = max(abs(one), abs(other), 1e-6)
        if not imaginary and max(abs(one.imag), abs(other.imag)) > 1e-9 * size:
            continue
        if abs(one - other) > 1e-7 * size:
            return True
        compared += 1
    return compared == 0
