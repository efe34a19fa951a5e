"""Code: the completion is a Python program, or the rest of one, and has to pass the tests given.

The record has the form of HumanEval (arXiv 2107.03374): ``tests`` (or ``test``), source text, or a
list of source texts, that either defines ``check(candidate)`` or consists of plain assertions;
``entry_point``, the name of the function; and ``prompt``, the beginning of the program, needed
where the completion continues it. The function may be a method of a class ``Solution`` (the form of
LeetCode), of which each call makes an instance; ``entry_point`` is then "f" or "Solution().f".
"""

from __future__ import annotations

import re
import warnings
from typing import Any, Iterable, Mapping

from megatron_rl.errors import UserError, one_line
from megatron_rl.rewards.base import Reward, make_reward, require
from megatron_rl.rewards.fences import begins_with_fence, fenced_blocks, loose_blocks
from megatron_rl.rewards.sandbox import Limits, run_program

#: Longest completion that is run, characters.
MAX_CHARACTERS = 100_000
_MOST_READINGS = 8


def verify_code(record: Mapping[str, Any], completion: str) -> Reward:
    """1.0 if the program passes every test inside the sandbox, else 0.0; well formed: it compiles.

    Raises ``UserError`` if the record lacks ``tests`` or ``entry_point``, or where the sandbox
    cannot be had.
    """
    entry_point, tests = _problem(record)
    if not completion.strip():
        return make_reward(False, False, "no answer")
    if len(completion) > MAX_CHARACTERS:
        return make_reward(
            False, False, f"answer of {len(completion)} characters, more than {MAX_CHARACTERS}"
        )
    prompt = record.get("prompt")
    programs = build_programs(prompt if isinstance(prompt, str) else "", completion, entry_point)
    outcome = run_program(programs, tests, entry_point, Limits())
    return make_reward(outcome.passed, outcome.compiled, outcome.reason)


def check_code_record(record: Mapping[str, Any]) -> None:
    """``UserError`` if the record lacks ``tests`` or ``entry_point``, the tests are no Python, or
    the entry point is no name: no completion could pass.
    """
    entry_point, tests = _problem(record)
    owner, _, name = entry_point.rpartition("().")  # of a method: "Solution().f"
    if not name.isidentifier() or not (owner or "C").isidentifier():
        raise UserError(
            f"entry_point {entry_point[:60]!r}; the verifier 'code' expects the name of a function "
            "or class; correct the data set"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of tests such as `assert f(2) is 4`
            compile(tests, "tests", "exec", dont_inherit=True)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise UserError(
            f"tests that do not compile ({one_line(error)[:120]}); the verifier 'code' expects "
            "Python source; correct the data set"
        ) from error


def build_programs(prompt: str, completion: str, entry_point: str) -> list[str]:
    """The programs that a completion can be read as; the first that compiles is the one to run.

    That is the whole completion, for code may hold fences in its docstrings, unless it begins with
    a fence ("~~~python" is an expression). Else it is the last fenced block that defines the entry
    point, without one the last block of Python, without one the last block; with the other ends
    that these can have.
    """
    readings = [] if begins_with_fence(completion) else [completion]
    if "```" in completion or "~~~" in completion:
        readings += _from_fences(completion, entry_point)
    programs = [_program(prompt, code, entry_point) for code in readings]
    return list(dict.fromkeys(programs))[:_MOST_READINGS]


def _program(prompt: str, code: str, entry_point: str) -> str:
    """Code that defines the entry point itself follows what stands before that definition in the
    prompt (imports, helpers); any other code continues the prompt.
    """
    name = _defined(code, entry_point)
    if name is None:
        return prompt + code
    method = entry_point.rpartition("().")[2]
    starts = [found.start() for key in (name, method) if (found := _definition(key).search(prompt))]
    return prompt[: min(starts)] + "\n" + code if starts else code


def _from_fences(completion: str, entry_point: str) -> list[str]:
    def defining(texts: Iterable[str]) -> list[str]:
        return [text for text in texts if _defined(text, entry_point)]

    blocks = fenced_blocks(completion)
    texts = [block.text for block in blocks]
    python = [block.text for block in blocks if block.is_python]
    longer = [text for block in reversed(blocks) for text in block.longer]
    loose = loose_blocks(completion)
    return [
        *(defining(texts) or python or texts)[-1:],
        *defining(longer),
        *(defining(loose) or loose)[-1:],
    ]


def _defined(code: str, entry_point: str) -> str | None:
    """The name in ``code`` that gives the entry point: its own, or of the class it is a method of;
    None if the code does not define it.
    """
    owner, _, method = entry_point.rpartition("().")
    if not owner and _definition(method).search(code):
        return method
    owner = owner or "Solution"
    head = _definition(owner).search(code)
    is_method = re.compile(rf"^[ \t]+(async[ \t]+)?def[ \t]+{re.escape(method)}\b", re.MULTILINE)
    return owner if head is not None and is_method.search(code, head.end()) else None


def _definition(name: str) -> re.Pattern[str]:
    name = re.escape(name)
    statement = rf"(?:async[ \t]+)?(?:def|class)[ \t]+{name}\b"
    assignment = rf"{name}[ \t]*(?::[^=\n]*)?=[ \t]*lambda\b"
    return re.compile(rf"^(?:{statement}|{assignment})", re.MULTILINE)


def _problem(record: Mapping[str, Any]) -> tuple[str, str]:
    """Entry point and tests."""
    entry_point = _text(require(record, "entry_point", "code"), "entry_point")
    key = "test" if "test" in record and "tests" not in record else "tests"
    return entry_point, _text(require(record, key, "code"), key)


def _text(value: Any, key: str) -> str:
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        value = "\n".join(value)
    if not isinstance(value, str):
        raise UserError(
            f"{key} of type {type(value).__name__}; the verifier 'code' expects text; "
            "correct the data set"
        )
    return value
