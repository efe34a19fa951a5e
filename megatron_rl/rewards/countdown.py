"""Countdown: reach a target from given numbers with + - * / and parentheses, in exact arithmetic.

Grammar of an answer (white space between tokens is free; digits are the ASCII ones)::

    answer     := expression [ "=" ["-"] integer ]
    expression := term   { ("+" | "-") term }
    term       := factor { ("*" | "/") factor }
    factor     := integer | "(" expression ")"

There is no unary sign: "-3+5" is not an expression, "5-3" is.
"""

from __future__ import annotations

from collections import Counter
from fractions import Fraction
from typing import Any, Mapping

from megatron_rl.catalogue.verifiers import CountdownSettings
from megatron_rl.errors import UserError, shown
from megatron_rl.rewards.base import Reward, make_reward, require

#: Longest answer, characters; with the next two it bounds time, memory and recursion.
MAX_CHARACTERS = 1024
MAX_DEPTH = 64
MAX_DIGITS = 20

_DEFAULTS = CountdownSettings()
_DIGITS = frozenset("0123456789")
_SYMBOLS = frozenset("+-*/()=")


class ExpressionError(ValueError):
    """The text does not match the grammar; the message gives the reason."""


def verify_countdown(
    record: Mapping[str, Any], completion: str, settings: CountdownSettings = _DEFAULTS
) -> Reward:
    """1.0 solved, ``settings.well_formed`` (0.1) well formed, 0.0 otherwise.

    Solved: the expression uses every number of ``record["numbers"]`` exactly once and no other, and
    its exact value is ``record["target"]``; a trailing "= n" must name the target. Well formed: the
    answer matches the grammar above, with any numbers, even if it divides by zero. Never raises on
    a completion; the time is linear in its length.
    """
    numbers, target = _problem(record)
    try:
        value, used, claimed = evaluate(extract_answer(completion))
    except ExpressionError as error:
        return make_reward(False, False, str(error))
    if Counter(used) != Counter(numbers):
        reason = f"uses {_listed(used)}, not each of {_listed(numbers)} once"
    elif value is None:
        reason = "divides by zero"
    elif value != target:
        reason = f"gives {_short(value)}, not {target}"
    elif claimed is not None and claimed != target:
        reason = f"states {claimed}, not {target}"
    else:
        return make_reward(True, True, "solved")
    return make_reward(False, True, reason, settings.well_formed)


def extract_answer(completion: str) -> str:
    """The content of the last ``<answer>...</answer>``; else the first line that is not blank.

    Raises ``ExpressionError`` if it is empty or longer than ``MAX_CHARACTERS``.
    """
    end = completion.rfind("</answer>")
    start = completion.rfind("<answer>", 0, end) if end >= 0 else -1
    if start >= 0:
        answer = completion[start + len("<answer>") : end].strip()
    else:
        answer = completion.lstrip().partition("\n")[0].rstrip()
    if not answer:
        raise ExpressionError("no answer")
    if len(answer) > MAX_CHARACTERS:
        raise ExpressionError(f"answer of {len(answer)} characters, more than {MAX_CHARACTERS}")
    return answer


def evaluate(answer: str) -> tuple[Fraction | None, list[int], int | None]:
    """Reads an answer: value (None: a division by zero), integers used in order, n of "= n".

    Raises ``ExpressionError`` if the text does not match the grammar, is nested too deep or has too
    long numbers.
    """
    parser = _Parser(_tokenize(answer))
    value = parser.expression(0)
    claimed = parser.claim()
    return value, parser.used, claimed


def _tokenize(answer: str) -> list[str]:
    tokens, position = [], 0
    while position < len(answer):
        character, start = answer[position], position
        position += 1
        if character in _DIGITS:
            while position < len(answer) and answer[position] in _DIGITS:
                position += 1
            if position - start > MAX_DIGITS:
                raise ExpressionError(f"number of {position - start} digits")
            tokens.append(answer[start:position])
        elif character in _SYMBOLS:
            tokens.append(character)
        elif not character.isspace():
            raise ExpressionError(f"unexpected character {character!a}")
    return tokens


class _Parser:
    """Recursive descent over the tokens; recursion is bounded by ``MAX_DEPTH`` parentheses."""

    def __init__(self, tokens: list[str]) -> None:
        self._tokens = tokens
        self._next = 0
        self.used: list[int] = []

    def expression(self, depth: int) -> Fraction | None:
        value = self._term(depth)
        while (symbol := self._take("+", "-")) is not None:
            other = self._term(depth)
            if value is not None:
                value = None if other is None else value + other if symbol == "+" else value - other
        return value

    def _term(self, depth: int) -> Fraction | None:
        value = self._factor(depth)
        while (symbol := self._take("*", "/")) is not None:
            other = self._factor(depth)
            if value is None or other is None or (symbol == "/" and other == 0):
                value = None
            else:
                value = value * other if symbol == "*" else value / other
        return value

    def _factor(self, depth: int) -> Fraction | None:
        if self._take("(") is not None:
            if depth == MAX_DEPTH:
                raise ExpressionError(f"more than {MAX_DEPTH} nested parentheses")
            value = self.expression(depth + 1)
            if self._take(")") is None:
                raise ExpressionError(f"expected ')', found {self._here()}")
            return value
        number = self._integer()
        self.used.append(number)
        return Fraction(number)

    def claim(self) -> int | None:
        """The integer after "=", None without one; the tokens must end here."""
        claimed = None
        if self._take("=") is not None:
            sign = -1 if self._take("-") is not None else 1
            claimed = sign * self._integer()
        if self._next < len(self._tokens):
            raise ExpressionError(f"expected the end, found {self._here()}")
        return claimed

    def _integer(self) -> int:
        if self._next == len(self._tokens) or self._tokens[self._next][0] not in _DIGITS:
            raise ExpressionError(f"expected a number, found {self._here()}")
        self._next += 1
        return int(self._tokens[self._next - 1])

    def _take(self, *symbols: str) -> str | None:
        if self._next < len(self._tokens) and self._tokens[self._next] in symbols:
            self._next += 1
            return self._tokens[self._next - 1]
        return None

    def _here(self) -> str:
        return repr(self._tokens[self._next]) if self._next < len(self._tokens) else "the end"


def check_countdown_record(record: Mapping[str, Any]) -> None:
    """Raises ``UserError`` if the record lacks ``numbers`` or ``target``, they have a wrong type,
    or no answer could use the numbers.
    """
    numbers, _ = _problem(record)
    if not numbers or not all(0 <= number < 10**MAX_DIGITS for number in numbers):
        raise UserError(
            f"numbers {_listed(numbers) or '[]'}; the verifier 'countdown' expects at least one, "
            f"none negative, each of at most {MAX_DIGITS} digits; correct the data set"
        )


def _problem(record: Mapping[str, Any]) -> tuple[list[int], int]:
    numbers = require(record, "numbers", "countdown")
    target = require(record, "target", "countdown")
    if not isinstance(numbers, (list, tuple)) or not all(type(number) is int for number in numbers):
        raise UserError(
            f"numbers {shown(numbers)}; the verifier 'countdown' expects a list of integers; "
            "correct the data set"
        )
    if type(target) is not int:
        raise UserError(
            f"target {shown(target)}; the verifier 'countdown' expects an integer; correct "
            "the data set"
        )
    return list(numbers), target


def _listed(numbers: list[int]) -> str:
    listed = " ".join(map(str, numbers[:8]))
    return listed + " ..." if len(numbers) > 8 else listed


def _short(value: Fraction) -> str:
    # A long product can have more digits than int-to-text conversion allows.
    if max(abs(value.numerator), value.denominator) >= 10**MAX_DIGITS:
        return f"a number of more than {MAX_DIGITS} digits"
    return str(value)
