"""Answers of Countdown: solved exactly if Python's own reading of the expression agrees."""

from __future__ import annotations

import ast
import contextlib
import operator
import random
import re
from collections import Counter
from fractions import Fraction
from pathlib import Path
from typing import Any, Iterator

from megatron_rl.rewards import VERIFIERS
from tools.fuzz.kind import Judge, Kind, Verdict, Wrong

_PIECES = (
    *("+", "-", "*", "/", "(", ")", "=", " ", "\n", "<answer>", "</answer>", "**", "//", "%", "_"),
    *(".", "e", "0x", "²", "٣", "\0", "\ud800", "−", "×", "((", "))", "()", "0", "00", "9" * 21),
    *("(" * 70, ")" * 70, "1+" * 600, "9" * 5000, "j", "~", "not ", "\u2028", "//", "<", "!"),
)
_OPERATORS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


def _expression(rng: random.Random, numbers: list[int]) -> str:
    if len(numbers) == 1:
        return str(numbers[0]) if rng.random() < 0.8 else f"({numbers[0]})"
    cut = rng.randrange(1, len(numbers))
    left, right = _expression(rng, numbers[:cut]), _expression(rng, numbers[cut:])
    text = f"{left}{rng.choice(['+', '-', '*', '/', ' + ', ' / '])}{right}"
    return f"({text})" if rng.random() < 0.7 else text


def make(rng: random.Random) -> tuple[dict[str, Any], str]:
    """A problem and an answer; half of the answers are spoiled."""
    numbers = [rng.randrange(30) for _ in range(rng.randint(1, 5))]
    answer = _expression(rng, rng.sample(numbers, len(numbers)))
    with contextlib.suppress(ZeroDivisionError):
        value = _value(ast.parse(answer, mode="eval").body)[0]
        if rng.random() < 0.7 and value.denominator == 1:
            target = value.numerator
            answer += f" = {target}" if rng.random() < 0.2 else ""
            return {"numbers": numbers, "target": target}, _spoiled(rng, answer)
    return {"numbers": numbers, "target": rng.randrange(100)}, _spoiled(rng, answer)


def _spoiled(rng: random.Random, answer: str) -> str:
    for _ in range(rng.choice([0, 0, 0, 1, 2, 5])):
        place = rng.randrange(len(answer) + 1)
        if rng.random() < 0.3:
            answer = answer[:place] + answer[place + 1 :]
        else:
            answer = answer[:place] + rng.choice(_PIECES) + answer[place:]
    return f"so <answer>{answer}</answer>" if rng.random() < 0.3 else answer


def _value(node: ast.expr) -> tuple[Fraction, list[int]]:
    """Value and numbers of an expression of + - * / and integers; ValueError: another."""
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return Fraction(node.value), [node.value]
    if not isinstance(node, ast.BinOp) or type(node.op) not in _OPERATORS:
        raise ValueError
    (left, used), (right, more) = _value(node.left), _value(node.right)
    return _OPERATORS[type(node.op)](left, right), used + more


def _solves(record: dict[str, Any], text: str) -> bool:
    """Whether Python's parser agrees, for digits, signs and parentheses, which both read alike."""
    answer = re.findall("<answer>((?:(?!<answer>).)*?)</answer>", text, re.DOTALL)
    line = answer[-1].strip() if answer else text.lstrip().partition("\n")[0].rstrip()
    expression, equals, claim = line.partition("=")
    try:
        # leading zeros are no Python; white space anywhere is no error here
        plain = re.sub(r"(?<![0-9])0+(?=[0-9])", "", " ".join(expression.split()))
        value, used = _value(ast.parse(plain, mode="eval").body)
    except (ValueError, SyntaxError, ZeroDivisionError, RecursionError, MemoryError):
        return False
    stated = re.fullmatch(r"(-?)([0-9]{1,20})", re.sub(r"\s", "", claim))
    right = not equals or (stated is not None and int(stated[0]) == record["target"])
    return right and Counter(used) == Counter(record["numbers"]) and value == record["target"]


@contextlib.contextmanager
def judging(folder: Path) -> Iterator[Judge]:
    """Without state."""

    def judge(case: tuple[dict[str, Any], str]) -> Verdict:
        record, text = case
        reward = VERIFIERS["countdown"](record, text)
        if reward.value not in (0.0, 0.1, 1.0) or not isinstance(reward.reason, str):
            raise Wrong(f"reward {reward}")
        if reward.value == 1.0 and not _solves(record, text):
            raise Wrong(f"accepted: {record} {text[:200]!a}")
        plain = re.fullmatch(r"(so <answer>)?[0-9+*/() -]{1,200}(</answer>)?", text)
        if reward.value != 1.0 and plain and _solves(record, text):
            raise Wrong(f"refused ({reward.reason}): {record} {text[:200]!a}")
        return Verdict.TAKEN if reward.value == 1.0 else Verdict.REFUSED

    yield judge


KIND = Kind("countdown", make, judging)
