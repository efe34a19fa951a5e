"""Code: the completion is a Python program, or the rest of one, and has to pass the tests given.

``code_record.py`` says which forms of records there are. Where a completion continues a program,
``prompt`` is its beginning. The function may be a method of a class ``Solution`` (the form of
LeetCode), of which each call makes an instance; the entry point is then "f" or "Solution().f".
"""

from __future__ import annotations

import re
from typing import Any, Iterable, Mapping

from megatron_rl.rewards.base import Reward, make_reward, prompt_texts, started
from megatron_rl.rewards.code_record import (
    is_python,
    prompt_definitions,
    prompt_sources,
    read_problem,
)
from megatron_rl.rewards.fences import begins_with_fence, fenced_blocks, loose_blocks
from megatron_rl.rewards.sandbox import Job, Limits, run_program

#: Longest completion that is run, characters.
MAX_CHARACTERS = 100_000
_MOST_READINGS = 8
_FUTURE = re.compile(r"^from __future__ import [\w, ]+\n", re.MULTILINE)


def verify_code(record: Mapping[str, Any], completion: str) -> Reward:
    """1.0 if the program passes every test inside the sandbox, else 0.0; well formed: it compiles.

    Raises ``UserError`` if the record lacks tests or their entry point, or where the sandbox cannot
    be had; ``RunFailed`` where the machine has no room for it.
    """
    problem = read_problem(record)
    if not completion.strip():
        return make_reward(False, False, "no answer")
    if len(completion) > MAX_CHARACTERS:
        return make_reward(
            False, False, f"answer of {len(completion)} characters, more than {MAX_CHARACTERS}"
        )
    prompt = record.get("prompt") if problem.entry_point else ""
    prompt = prompt if isinstance(prompt, str) else ""
    programs = build_programs(prompt, completion, problem.entry_point)
    own = prompt_definitions(prompt or _said_to_model(record))
    job = Job(programs, problem.entry_point, problem.tests, problem.cases, own)
    with started("the code sandbox"):
        outcome = run_program(job, Limits())
    return make_reward(outcome.passed, outcome.compiled, outcome.reason)


def _said_to_model(record: Mapping[str, Any]) -> str:
    """Of chat messages; none of its own, for the tests rely on what is defined there."""
    messages = record.get("prompt") or record.get("messages")
    if not isinstance(messages, list):
        return ""
    given = [m for m in messages if isinstance(m, Mapping) and m.get("role") != "assistant"]
    return "\n\n".join(prompt_texts(given))


def build_programs(prompt: str, completion: str, entry_point: str) -> list[str]:
    """The programs that a completion can be read as; the first that compiles is the one to run.

    That is the whole completion, for code may hold fences in its docstrings, unless it begins with
    a fence ("~~~python" is an expression). Else it is the last fenced block that defines the entry
    point, without one the last block of Python, without one the last block; with the other ends
    that these can have. Without an entry point nothing has to be defined.
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
    name = _defined(code, entry_point) if entry_point else None
    if name is None:
        return prompt + code
    method = entry_point.rpartition("().")[2]
    head = re.compile("|".join(_definition(key).pattern for key in (name, method)), re.MULTILINE)
    for source in prompt_sources(prompt):
        if (found := head.search(source)) is not None:
            # Imports of what is to come stand at the beginning of a program.
            before = "".join(_FUTURE.findall(code)) + source[: found.start()] + "\n"
            # A decorator may be the last line of it; of a prompt in words it is no Python.
            follows = is_python(before + "def f(): pass")
            return before + _FUTURE.sub("\n", code) if follows else code
    return code


def _from_fences(completion: str, entry_point: str) -> list[str]:
    def defining(texts: Iterable[str]) -> list[str]:
        return [] if not entry_point else [text for text in texts if _defined(text, entry_point)]

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
