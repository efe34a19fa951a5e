"""Code: the completion is a Python program, or the rest of one, and has to pass the tests given.

The record has the form of HumanEval (arXiv 2107.03374): ``tests`` (or ``test``), source text, or a
list of source texts, that either defines ``check(candidate)`` or consists of plain assertions;
``entry_point``, the name of the function; and ``prompt``, the beginning of the program, needed
where the completion continues it.
"""

from __future__ import annotations

import re
import warnings
from typing import Any, Mapping

from megatron_rl.errors import UserError, one_line
from megatron_rl.rewards.base import Reward, make_reward, require
from megatron_rl.rewards.sandbox import Limits, run_program

#: Longest completion that is run, characters.
MAX_CHARACTERS = 100_000


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
    program = build_program(prompt if isinstance(prompt, str) else "", completion, entry_point)
    outcome = run_program(program, tests, entry_point, Limits())
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


def build_program(prompt: str, completion: str, entry_point: str) -> str:
    """The program to run.

    Of a completion with fenced blocks (```), the last block that defines ``entry_point``, else the
    last block. Code that defines ``entry_point`` itself follows what stands before that definition
    in the prompt (imports, helpers); any other code continues the prompt.
    """
    code = _fenced(completion, entry_point)
    definition = _definition(entry_point)
    if definition.search(code) is None:
        return prompt + code
    in_prompt = definition.search(prompt)
    return code if in_prompt is None else prompt[: in_prompt.start()] + "\n" + code


def _fenced(completion: str, entry_point: str) -> str:
    # Text outside the fences has even places in the list, blocks have odd ones.
    pieces = completion.split("```")
    blocks = [_without_language(block) for block in pieces[1::2]]
    if not blocks:
        return completion
    defining = [block for block in blocks if _definition(entry_point).search(block)]
    return (defining or blocks)[-1]


def _without_language(block: str) -> str:
    """Drops the language name that may follow the opening fence on its line."""
    first, separator, rest = block.partition("\n")
    return rest if separator and first.strip().lower() in ("", "python", "python3", "py") else block


def _definition(entry_point: str) -> re.Pattern[str]:
    return re.compile(rf"^(async[ \t]+)?(def|class)[ \t]+{re.escape(entry_point)}\b", re.MULTILINE)


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
