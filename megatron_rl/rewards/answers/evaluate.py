"""Values of algebraic trees (``answers/algebra.py``): exact, modulo a prime, and in floating point.

All are bounded: a power or a factorial that is too large has no value.
"""

from __future__ import annotations

import cmath
import hashlib
import math
from fractions import Fraction
from typing import Any, Callable, Mapping

from megatron_rl.rewards.answers.algebra import Tree, symbols, walk

PRIME = 2**61 - 1
_MAX_BITS = 4096
_MAX_FACTORIAL = 400
#: Values of the variables at which expressions are compared: none is special to any function.
_POINTS = (0.7318, 1.3917, 2.6180, -0.5772, -1.8393, 3.3598, 17.1729, -14.0833)
_SPREAD = 0.3819


class NoValue(ArithmeticError):
    """The value is undefined there, of another kind, or too large."""


def exact(tree: Tree) -> Fraction | None:
    """The value of an expression without variables; None unless it is rational and not huge."""
    try:
        return _exact(tree)
    except (NoValue, ZeroDivisionError, OverflowError):
        return None


def _exact(tree: Tree) -> Fraction:
    kind = tree[0]
    if kind == "num":
        return _bounded(Fraction(tree[1]))
    if kind not in _EXACT:
        raise NoValue(kind)
    return _bounded(_EXACT[kind](*(_exact(child) for child in tree[1:])))


def _bounded(value: Fraction) -> Fraction:
    if max(value.numerator.bit_length(), value.denominator.bit_length()) > 8 * _MAX_BITS:
        raise NoValue("size")
    return value


def _exact_power(base: Fraction, exponent: Fraction) -> Fraction:
    if exponent.denominator != 1:
        return _exact_root(_exact_power(base, Fraction(exponent.numerator)), exponent.denominator)
    bits = max(base.numerator.bit_length(), base.denominator.bit_length())
    if bits > 1 and abs(exponent) * bits > _MAX_BITS:
        raise NoValue("size")
    if base == 0 and exponent <= 0:
        raise NoValue("0^0")
    return base ** (exponent.numerator if bits > 1 else exponent.numerator % 2 or 2)


def _exact_root(value: Fraction, index: Fraction | int) -> Fraction:
    if Fraction(index).denominator != 1 or not 2 <= index <= 64:
        raise NoValue("index")
    n = int(index)
    if value < 0:
        if n % 2 == 0:
            raise NoValue("not real")
        return -_exact_root(-value, n)
    return Fraction(_integer_root(value.numerator, n), _integer_root(value.denominator, n))


def _integer_root(value: int, n: int) -> int:
    low, high = 0, 1 << (value.bit_length() // n + 1)
    while low < high:
        middle = (low + high) // 2
        if middle**n < value:
            low = middle + 1
        else:
            high = middle
    if low**n != value:
        raise NoValue("irrational")
    return low


def _exact_factorial(value: Fraction) -> Fraction:
    if value.denominator != 1 or not 0 <= value <= _MAX_FACTORIAL:
        raise NoValue("factorial")
    return Fraction(math.factorial(int(value)))


def _exact_binomial(above: Fraction, below: Fraction) -> Fraction:
    if above.denominator != 1 or below.denominator != 1 or not 0 <= below <= above <= 2000:
        raise NoValue("binomial")
    return Fraction(math.comb(int(above), int(below)))


#: The same of fractions and of floating-point numbers.
_ARITHMETIC: dict[str, Callable[..., Any]] = {
    "add": lambda a, b: a + b,
    "mixed": lambda a, b: a + b,
    "mul": lambda a, b: a * b,
    "div": lambda a, b: a / b,
    "neg": lambda a: -a,
}
_EXACT: dict[str, Callable[..., Fraction]] = {
    **_ARITHMETIC,
    "pow": _exact_power,
    "root": _exact_root,
    "fact": _exact_factorial,
    "binom": _exact_binomial,
}


def modular(tree: Tree, seed: int) -> int | None:
    """The value modulo ``PRIME``, with values of the variables that ``seed`` decides.

    Two quotients of polynomials that agree at a few such points are equal (Schwartz, Zippel).
    Roots, functions, and constants such as pi count as further variables: then agreement still
    proves equality, but disagreement proves nothing. None: undefined.
    """
    try:
        return _modular(tree, seed)
    except (NoValue, ZeroDivisionError):
        return None


def _pseudo_random(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") % PRIME


def _modular(tree: Tree, seed: int) -> int:
    kind = tree[0]
    if kind == "num":
        value = Fraction(tree[1])
        return value.numerator * _inverse(value.denominator) % PRIME
    if kind == "pow":
        exponent = exact(tree[2])
        if exponent is None or exponent.denominator != 1 or abs(exponent) > 10**6:
            return _pseudo_random(f"{seed} {tree}")
        base = _modular(tree[1], seed)
        power = pow(base, abs(int(exponent)), PRIME)
        return power if exponent >= 0 else _inverse(power)
    if kind not in ("add", "mixed", "mul", "div", "neg"):
        return _pseudo_random(f"{seed} {tree}")
    first, *rest = (_modular(child, seed) for child in tree[1:])
    if kind == "neg":
        return -first % PRIME
    second = rest[0]
    if kind == "div":
        return first * _inverse(second) % PRIME
    return (first * second if kind == "mul" else first + second) % PRIME


def _inverse(value: int) -> int:
    if value % PRIME == 0:
        raise ZeroDivisionError
    return pow(value, PRIME - 2, PRIME)


def at_points(tree: Tree) -> list[complex | None]:
    """Floating-point values at some points; None where undefined or infinite."""
    names = sorted(symbols(tree))
    results: list[complex | None] = []
    for point in _POINTS if names else _POINTS[:1]:
        values = {name: point + _SPREAD * index for index, name in enumerate(names)}
        try:
            value = _floating(tree, values)
        except (NoValue, ArithmeticError, ValueError):
            value = None
        results.append(value if value is not None and cmath.isfinite(value) else None)
    return results


def _floating(tree: Tree, values: Mapping[str, complex]) -> complex:
    kind = tree[0]
    if kind == "num":
        return complex(float(Fraction(tree[1])))
    if kind == "sym":
        return complex(values[tree[1]])
    if kind == "const":
        return {"pi": complex(math.pi), "e": complex(math.e), "i": 1j, "inf": complex(math.inf)}[
            tree[1]
        ]
    if kind == "fn":
        return complex(_FUNCTIONS[tree[1]](_floating(tree[2], values)))
    return _FLOATING[kind](*(_floating(child, values) for child in tree[1:]))


def _real(value: complex) -> float:
    if abs(value.imag) > 1e-12 * max(1.0, abs(value)):
        raise NoValue("not real")
    return value.real


def _power(base: complex, exponent: complex) -> complex:
    if base == 0 and exponent == 0:
        raise NoValue("0^0")
    return base**exponent


def _root(value: complex, index: complex) -> complex:
    n = _real(index)
    if value.imag == 0 and value.real < 0 and n % 2 == 1:
        return complex(-((-value.real) ** (1 / n)))  # the real root
    return value ** (1 / n)


def _factorial(value: complex) -> complex:
    number = _real(value)
    if number < 0 or number > 170:
        raise NoValue("factorial")
    return complex(math.gamma(number + 1))


def _binomial(above: complex, below: complex) -> complex:
    return _factorial(above) / _factorial(below) / _factorial(above - below)


def _whole(function: Callable[[float], int]) -> Callable[[complex], complex]:
    """A step function; no value where rounding could decide."""

    def apply(value: complex) -> complex:
        number = _real(value)
        if number != round(number) and abs(number - round(number)) < 1e-9 * max(1, abs(number)):
            raise NoValue("at a step")
        return complex(function(number))

    return apply


_FLOATING: dict[str, Callable[..., complex]] = {
    **_ARITHMETIC,
    "pow": _power,
    "root": _root,
    "fact": _factorial,
    "binom": _binomial,
    "log": lambda base, a: cmath.log(a) / cmath.log(base),
}
_FUNCTIONS: dict[str, Callable[[complex], complex]] = {
    "sin": cmath.sin,
    "cos": cmath.cos,
    "tan": cmath.tan,
    "cot": lambda a: 1 / cmath.tan(a),
    "sec": lambda a: 1 / cmath.cos(a),
    "csc": lambda a: 1 / cmath.sin(a),
    "sinh": cmath.sinh,
    "cosh": cmath.cosh,
    "tanh": cmath.tanh,
    "asin": cmath.asin,
    "acos": cmath.acos,
    "atan": cmath.atan,
    "ln": cmath.log,
    "abs": abs,
    "sign": lambda a: math.copysign(1.0, _real(a)) if a != 0 else 0.0,
    "floor": _whole(math.floor),
    "ceil": _whole(math.ceil),
}


def is_rational_function(tree: Tree) -> bool:
    """Whether it has only + - * / and whole powers of numbers and variables."""
    kinds = ("num", "sym", "add", "mixed", "mul", "div", "neg")
    return all(
        node[0] in kinds or node[0] == "pow" and (exact(node[2]) or Fraction(1, 2)).denominator == 1
        for node in walk(tree)
    )
