"""The forms of records that the verifier 'code' reads.

* ``tests`` (or ``test``): source text, or a list of source texts, and ``entry_point``, the name of
  the function: the form of HumanEval (arXiv 2107.03374). The tests define ``check(candidate)``,
  functions ``test_*`` or ``unittest`` classes, or consist of plain assertions.
* ``inputs`` and ``outputs``, lists of the same length: texts that the program reads and prints; or,
  with an ``entry_point``, lists of arguments and results. Input and output may be lists of lines.
* ``input_output``, an object (or JSON text) with those two and perhaps ``fn_name`` for the entry
  point: the form of APPS (arXiv 2105.09938) and TACO.
"""

from __future__ import annotations

import ast
import functools
import json
import warnings
from dataclasses import dataclass
from typing import Any, Mapping

from megatron_rl.errors import UserError, one_line
from megatron_rl.rewards.base import require
from megatron_rl.rewards.fences import fenced_blocks

_REMEDY = "correct the data set"
_DEFINING = (
    *(ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Import, ast.ImportFrom),
    *(ast.Assign, ast.AnnAssign),
)


@dataclass(frozen=True)
class CodeProblem:
    """The tests of a program: ``tests`` or ``cases``."""

    entry_point: str  #: "": the program reads its input and prints
    tests: str = ""
    cases: tuple[tuple[Any, Any], ...] = ()


def read_problem(record: Mapping[str, Any]) -> CodeProblem:
    """Raises ``UserError`` if the record has no tests, or tests of a wrong type."""
    for source in (record, _input_output(record)):
        if "inputs" in source or "outputs" in source:
            return _cases(source)
    entry_point = _text(require(record, "entry_point", "code"), "entry_point")
    key = "test" if "test" in record and "tests" not in record else "tests"
    return CodeProblem(entry_point, _text(require(record, key, "code"), key))


def check_code_record(record: Mapping[str, Any]) -> None:
    """``UserError`` if the record lacks tests or their entry point, the tests are no Python, or the
    entry point is no name: no completion could pass.
    """
    problem = read_problem(record)
    owner, _, name = problem.entry_point.rpartition("().")  # of a method: "Solution().f"
    if problem.cases and not problem.entry_point:
        return
    if not name.isidentifier() or not (owner or "C").isidentifier():
        raise UserError(
            f"entry_point {problem.entry_point[:60]!r}; the verifier 'code' expects the name of a "
            f"function or class; {_REMEDY}"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # from tests such as `assert f(2) is 4`
            compile(problem.tests, "tests", "exec", dont_inherit=True)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise UserError(
            f"tests that do not compile ({one_line(error)[:120]}); the verifier 'code' expects "
            f"Python source; {_REMEDY}"
        ) from error


def prompt_sources(prompt: str) -> list[str]:
    """The Python code of a prompt: all of it, or the fenced blocks of a text with some. A function
    that breaks off after its head is completed.
    """
    if "```" not in prompt and "~~~" not in prompt or _completed(prompt) is not None:
        return [prompt]
    blocks = [_completed(block.text) for block in fenced_blocks(prompt) if block.is_python]
    return [block for block in blocks if block is not None] or [prompt]


def prompt_definitions(prompt: str) -> str:
    """The definitions in a prompt, for the tests; from fenced blocks no example code that runs
    something.
    """
    sources = prompt_sources(prompt)
    if sources == [prompt]:
        return prompt
    statements = [statement for source in sources for statement in ast.parse(source).body]
    kept: list[ast.stmt] = [one for one in statements if isinstance(one, _DEFINING)]
    return ast.unparse(ast.Module(kept, []))


def _completed(text: str) -> str | None:
    ends = ("", "\n    pass\n", "\n        pass\n")
    return next((text + end for end in ends if is_python(text + end)), None)


@functools.lru_cache(maxsize=256)
def is_python(text: str) -> bool:
    """Whether the text is valid Python."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True


def _input_output(record: Mapping[str, Any]) -> Mapping[str, Any]:
    source = record.get("input_output", {})
    if isinstance(source, str):
        try:
            source = json.loads(source)
        except (ValueError, RecursionError) as error:
            raise UserError(
                f"input_output that is no JSON ({one_line(error)[:120]}); the verifier 'code' "
                f"expects an object with inputs and outputs; {_REMEDY}"
            ) from error
    if not isinstance(source, Mapping):
        raise _bad_type("input_output", source, "an object with inputs and outputs")
    return source


def _cases(source: Mapping[str, Any]) -> CodeProblem:
    name = source.get("entry_point") or source.get("fn_name") or ""
    entry_point = _text(name, "entry_point")
    columns = []
    for key in ("inputs", "outputs"):
        column = require(source, key, "code")
        if not isinstance(column, list):
            raise _bad_type(key, column, "a list")
        columns.append(column if entry_point else [_text(item, key) for item in column])
    inputs, outputs = columns
    if len(inputs) != len(outputs) or not inputs:
        raise UserError(
            f"{len(inputs)} inputs and {len(outputs)} outputs; the verifier 'code' expects as many "
            f"of both, and at least one; {_REMEDY}"
        )
    if entry_point:
        for given in inputs:
            if not isinstance(given, list):
                raise _bad_type("an entry of inputs", given, "a list of arguments")
        if "fn_name" in source and all(isinstance(o, list) and len(o) == 1 for o in outputs):
            outputs = [output[0] for output in outputs]  # APPS writes results in brackets
    return CodeProblem(entry_point, cases=tuple(zip(inputs, outputs)))


def _text(value: Any, key: str) -> str:
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        value = "\n".join(value)
    if not isinstance(value, str):
        raise _bad_type(key, value, "text")
    return value


def _bad_type(key: str, value: Any, expected: str) -> UserError:
    return UserError(
        f"{key} of type {type(value).__name__}; the verifier 'code' expects {expected}; {_REMEDY}"
    )
