"""Mathematics: the final answer of a completion against the record's ``answer``.

This module reads and compares answers in bounded time. Only expressions with roots, functions or
constants that floating point cannot tell apart go to SymPy. It runs in a worker process, because it
can compute for ever on an answer of a dozen characters.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, Mapping

from megatron_rl.errors import UserError
from megatron_rl.rewards.answers.algebra import Tree
from megatron_rl.rewards.answers.compare import MAX_ANSWER_CHARACTERS, is_restated, is_same_answer
from megatron_rl.rewards.answers.extract import extract_answer, last_boxed
from megatron_rl.rewards.base import Reward, make_reward, prompt_texts, require
from megatron_rl.rewards.worker_pool import WorkerPool

#: Characters at the end of a problem that are searched for the answer's text.
MAX_PROBLEM_CHARACTERS = 20_000
#: Keys of a record that may hold the problem.
_PROBLEM_KEYS = ("prompt", "question", "problem", "messages")

_WORKER = Path(__file__).with_name("math_worker.py")
_COMPARE_CPU_S = 3.0
_COMPARE_WALL_S = 120.0
_REMEDY = "the verifier 'math' expects SymPy; pip install sympy"


class MathVerifier:
    """A verifier with worker processes, started at the first answer that needs SymPy."""

    def __init__(self, cpu_s: float = _COMPARE_CPU_S) -> None:
        """cpu_s: limit of processor time for a comparison by SymPy, seconds."""
        self._workers = WorkerPool(_WORKER, cpu_s, _COMPARE_WALL_S, _REMEDY)

    def __call__(self, record: Mapping[str, Any], completion: str) -> Reward:
        r"""1.0 if the completion's answer equals the record's, else 0.0; well formed: it has one.

        The completion's answer is its last \boxed{}, else its last number. ``record["answer"]`` is
        a number, or a text whose part after the last "####" counts (GSM8K, arXiv 2110.14168). Never
        raises on a completion; ``UserError`` if the record has no answer or SymPy is needed and not
        installed.
        """
        expected = reference_answer(require(record, "answer", "math"))
        answer = extract_answer(completion)
        if answer is None:
            return make_reward(False, False, "no answer: neither \\boxed{} nor a number")
        if len(answer) > max(MAX_ANSWER_CHARACTERS, 2 * len(expected)):
            reason = f"answer of {len(answer)} characters, more than are read"
            return make_reward(False, True, reason)
        if is_same_answer(expected, answer, self._ask_worker):
            texts = [text for key in _PROBLEM_KEYS for text in prompt_texts(record.get(key))]
            problem = [text[-MAX_PROBLEM_CHARACTERS:] for text in texts]
            if is_restated(expected, answer, problem):
                return make_reward(False, True, f"answer {answer!a} restates the problem"[:300])
            return make_reward(True, True, "solved")
        return make_reward(False, True, f"answer {answer!a}, not {expected!a}"[:300])

    def _ask_worker(self, expected: Tree, answer: Tree) -> bool:
        # Too slow, or out of memory: an answer that cannot be verified.
        return self._workers.ask(json.dumps([expected, answer])) == "true"


verify_math = MathVerifier()


def check_math_record(record: Mapping[str, Any]) -> None:
    """Raises ``UserError`` if the record has no ``answer``, or one that no completion could
    match.
    """
    reference_answer(require(record, "answer", "math"))


def reference_answer(answer: Any) -> str:
    """The text after the last "####" if there is one; ``UserError`` if it is empty or no text."""
    if isinstance(answer, bool) or not isinstance(answer, (str, int, float)):
        kind = type(answer).__name__
        raise UserError(
            f"answer of type {kind}; the verifier 'math' expects text or a number; "
            "correct the data set"
        )
    if isinstance(answer, float):
        if not math.isfinite(answer):
            raise UserError(
                f"answer {answer}; the verifier 'math' expects text or a finite number; "
                "correct the data set"
            )
        answer = f"{answer:.15g}"  # the digits that survive a float, not its noise
    text = str(answer).rpartition("####")[2].strip()
    boxed = last_boxed(text)
    text = text if boxed is None else boxed
    if not text:
        raise UserError(
            "empty answer; the verifier 'math' expects a reference answer; correct the data set"
        )
    return text
