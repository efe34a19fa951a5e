"""Mathematics: the final answer of a completion against the record's ``answer``.

Plain numbers are compared exactly here. Everything else (fractions in LaTeX, sets, expressions...)
goes to math-verify, which runs in a worker process: SymPy can compute for ever on an answer of a
dozen characters, and math-verify's own time limit is a signal, which works in the main thread only.
"""

from __future__ import annotations

import json
import re
from fractions import Fraction
from pathlib import Path
from typing import Any, Mapping

from megatron_rl.errors import UserError
from megatron_rl.rewards.base import Reward, make_reward, require
from megatron_rl.rewards.worker_pool import WorkerPool

#: Only this much of the end of a completion is searched for its answer, characters.
MAX_CHARACTERS = 20_000
#: Longest answer that is compared, characters.
MAX_ANSWER_CHARACTERS = 256

_WORKER = Path(__file__).with_name("math_worker.py")
_COMPARE_CPU_S = 3.0
_COMPARE_WALL_S = 120.0
_REMEDY = (
    "the verifier 'math' expects math-verify and its parser; pip install 'math-verify[antlr4_13_2]'"
)

# A hyphen behind a digit, a letter or a bracket is an operator, not a sign.
_NUMBER = re.compile(
    r"(?:(?<![\w)\]}])-)?"
    r"(?:(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?(?:/[0-9]+)?|\.[0-9]+)",
    re.ASCII,
)


class MathVerifier:
    """A verifier with worker processes for the answers that are no plain numbers."""

    def __init__(self, cpu_s: float = _COMPARE_CPU_S) -> None:
        """cpu_s: processor time a comparison may take, seconds."""
        self._workers = WorkerPool(_WORKER, cpu_s, _COMPARE_WALL_S, _REMEDY)

    def __call__(self, record: Mapping[str, Any], completion: str) -> Reward:
        r"""1.0 if the completion's answer equals the record's, else 0.0; well formed: it has one.

        The completion's answer is its last \boxed{}, without one its last number.
        ``record["answer"]`` is a number or text, of which what follows the last "####" counts
        (GSM8K, arXiv 2110.14168). Never raises on a completion; ``UserError`` if the record has no
        answer or math-verify is needed and not installed.
        """
        expected = reference_answer(require(record, "answer", "math"))
        answer = extract_answer(completion)
        if answer is None:
            return make_reward(False, False, "no answer: neither \\boxed{} nor a number")
        if len(answer) > MAX_ANSWER_CHARACTERS:
            reason = f"answer of {len(answer)} characters, more than {MAX_ANSWER_CHARACTERS}"
            return make_reward(False, True, reason)
        if self._equal(expected, answer):
            return make_reward(True, True, "solved")
        return make_reward(False, True, f"answer {answer!a}, not {expected!a}"[:300])

    def _equal(self, expected: str, answer: str) -> bool:
        left, right = plain_number(expected), plain_number(answer)
        if left is not None and right is not None:
            if left == right:
                return True
            if left.denominator == right.denominator == 1:
                return False  # only decimals and fractions may differ by their rounding
        return self._ask_worker(expected, answer)

    def _ask_worker(self, expected: str, answer: str) -> bool:
        # Too slow, or out of memory: an answer that cannot be verified.
        return self._workers.ask(json.dumps([expected, answer])) == "true"


verify_math = MathVerifier()


def reference_answer(answer: Any) -> str:
    """What follows the last "####" if there is one; ``UserError`` if it is empty or no text."""
    if isinstance(answer, bool) or not isinstance(answer, (str, int, float)):
        kind = type(answer).__name__
        raise UserError(
            f"answer of type {kind}; the verifier 'math' expects text or a number; "
            "correct the data set"
        )
    text = str(answer).rpartition("####")[2].strip()
    boxed = last_boxed(text)
    text = text if boxed is None else boxed
    if not text:
        raise UserError(
            "empty answer; the verifier 'math' expects a reference answer; correct the data set"
        )
    return text


def extract_answer(completion: str) -> str | None:
    r"""The content of the last complete \boxed{}, else the last number, else None."""
    tail = completion[-MAX_CHARACTERS:]
    boxed = last_boxed(tail)
    if boxed is not None:
        return boxed or None
    # Numbers hold no white space: reading the words from the end avoids a scan of the whole text.
    for word in reversed(tail.split()):
        found = _NUMBER.findall(word)
        if found:
            return found[-1]
    return None


def last_boxed(text: str) -> str | None:
    r"""The stripped content of the last \boxed{...} whose braces balance; None without one."""
    start = text.rfind("\\boxed{")
    tries = 8  # unclosed boxes at the end of a text are few; more are not worth the time
    while start >= 0 and tries > 0:
        depth = 0
        for position in range(start + len("\\boxed"), len(text)):
            depth += {"{": 1, "}": -1}.get(text[position], 0)
            if depth == 0:
                return text[start + len("\\boxed{") : position].strip()
        start = text.rfind("\\boxed{", 0, start)
        tries -= 1
    return None


def plain_number(text: str) -> Fraction | None:
    """An integer, decimal or fraction, its commas, dollar and percent sign dropped; or None."""
    bare = (
        text.replace("\\$", "")
        .replace("$", "")
        .replace("\\%", "")
        .replace("%", "")
        .strip()
        .rstrip(".")
    )
    if len(bare) > MAX_ANSWER_CHARACTERS or _NUMBER.fullmatch(bare) is None:
        return None
    numerator, _, denominator = bare.replace(",", "").partition("/")
    if denominator and int(denominator) == 0:
        return None
    return Fraction(numerator) / (int(denominator) if denominator else 1)
