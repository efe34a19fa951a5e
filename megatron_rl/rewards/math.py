"""Mathematics: the final answer of a completion against the record's ``answer``.

Plain numbers are compared exactly here. Everything else (fractions in LaTeX, sets, expressions...)
goes to math-verify, which runs in a worker process: SymPy can compute for ever on an answer of a
dozen characters, and math-verify's own time limit is a signal, which works in the main thread only.
"""

from __future__ import annotations

import json
import os
import re
import select
import subprocess
import sys
import threading
import time
from fractions import Fraction
from pathlib import Path
from typing import Any, Mapping

from megatron_rl.errors import UserError
from megatron_rl.rewards.base import Reward, make_reward, require

#: Only this much of the end of a completion is searched for its answer, characters.
MAX_CHARACTERS = 20_000
#: Longest answer that is compared, characters.
MAX_ANSWER_CHARACTERS = 256

_WORKER = Path(__file__).with_name("math_worker.py")
_START_S = 60.0
_COMPARE_S = 5.0

# A hyphen behind a digit, a letter or a bracket is an operator, not a sign.
_NUMBER = re.compile(
    r"(?:(?<![\w)\]}])-)?"
    r"(?:(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?(?:/[0-9]+)?|\.[0-9]+)",
    re.ASCII,
)


class MathVerifier:
    """A verifier with a worker process, started at the first answer that is not a plain number.

    The worker ends with the process that uses it; one that overruns its time is killed and replaced
    at the next need.
    """

    def __init__(self, compare_s: float = _COMPARE_S) -> None:
        self._compare_s = compare_s
        self._lock = threading.Lock()
        self._worker: subprocess.Popen | None = None
        self._owner = 0  # a forked copy of this process must not share the worker's pipes

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
        with self._lock:
            worker = self._running_worker()
            reply = _exchange(worker, json.dumps([expected, answer]), self._compare_s)
            if reply not in ("true", "false"):
                self._stop()  # too slow, or out of memory: an answer that cannot be verified
            return reply == "true"

    def _running_worker(self) -> subprocess.Popen:
        if self._worker is None or self._owner != os.getpid() or self._worker.poll() is not None:
            self._worker, self._owner = _start_worker(), os.getpid()
        return self._worker

    def _stop(self) -> None:
        if self._worker is not None:
            self._worker.kill()
            self._worker.wait()
            self._worker.stdin.close()
            self._worker.stdout.close()
            self._worker = None


verify_math = MathVerifier()


def check_math_record(record: Mapping[str, Any]) -> None:
    """``UserError`` if the record has no ``answer``, or one that no completion could match."""
    reference_answer(require(record, "answer", "math"))


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


def _start_worker() -> subprocess.Popen:
    worker = subprocess.Popen(
        # Run as a script, it would import the math.py beside it instead of the standard library's.
        [
            sys.executable,
            "-c",
            f"import runpy; runpy.run_path({str(_WORKER)!r}, run_name='__main__')",
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    ready = _read_line(worker, time.monotonic() + _START_S)
    if ready != "ready":
        worker.kill()
        worker.wait()
        raise UserError(
            f"math-verify worker: {ready or 'no reply'}; "
            "the verifier 'math' expects math-verify and its parser; "
            "pip install 'math-verify[antlr4_13_2]'"
        )
    return worker


def _exchange(worker: subprocess.Popen, line: str, seconds: float) -> str:
    """Sends a line, returns the reply; "" if the worker died or took longer."""
    try:
        worker.stdin.write(line.encode() + b"\n")
        worker.stdin.flush()
    except BrokenPipeError:
        return ""
    return _read_line(worker, time.monotonic() + seconds)


def _read_line(worker: subprocess.Popen, deadline: float) -> str:
    poll = select.poll()
    poll.register(worker.stdout, select.POLLIN)
    data = b""
    while not data.endswith(b"\n"):
        remaining = deadline - time.monotonic()
        if remaining <= 0 or not poll.poll(1000 * remaining):
            return ""
        chunk = os.read(worker.stdout.fileno(), 4096)
        if not chunk:
            return ""
        data += chunk
    return data.decode().strip()
