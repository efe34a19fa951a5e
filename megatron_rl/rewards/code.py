"""Code: the completion is a Python program, or the continuation of one, and must pass the tests.

``code_record.py`` lists the forms of records. If a completion continues a program, ``prompt`` is
its beginning. The function may be a method of a class ``Solution`` (as on LeetCode), with a new
instance for each call; the entry point is then "f" or "Solution().f".
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

#: Longest completion to run, characters.
MAX_CHARACTERS = 100_000
_MOST_READINGS = 8
_FUTURE = re.compile(r"^from __future__ import [\w, ]+\n", re.MULTILINE)


def verify_code(record: Mapping[str, Any], completion: str) -> Reward:
    """1.0 if the program passes every test inside the sandbox, else 0.0; well formed: it compiles.

    Raises ``UserError`` if the record lacks tests or their entry point, or if the machine has no
    sandbox; ``RunFailed`` if the machine has no room for it.
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
    """The texts of chat messages that were given to the model, without the model's own: the tests
    rely on their definitions.
    """
    messages = record.get("prompt") or record.get("messages")
    if not isinstance(messages, list):
        return ""
    given = [m for m in messages if isinstance(m, Mapping) and m.get("role") != "assistant"]
    return "\n\n".join(prompt_texts(given))


def build_programs(prompt: str, completion: str, entry_point: str) -> list[str]:
    """The possible programs in a completion; the first that compiles is run.

    The first is the whole completion, because code may have fences in its docstrings, unless it
    begins with a fence ("~~~python" is an expression). Then comes the last fenced block that
    defines the entry point, else the last block of Python, else the last block, with each possible
    end of the block. Without an entry point a block need not define anything.
    """
    readings = [] if begins_with_fence(completion) else [completion]
    if "```" in completion or "~~~" in completion:
        readings += _from_fences(completion, entry_point)
    programs = [_program(prompt, code, entry_point) for code in readings]
    return list(dict.fromkeys(programs))[:_MOST_READINGS]


def _program(prompt: str, code: str, entry_point: str) -> str:
    """If the code defines the entry point, it follows the prompt's text before that definition
    (imports, helpers); other code continues the whole prompt.
    """
    name = _defined(code, entry_point) if entry_point else None
    if name is None:
        return prompt + code
    method = entry_point.rpartition("().")[2]
    head = re.compile("|".join(_definition(key).pattern for key in (name, method)), re.MULTILINE)
    for source in prompt_sources(prompt):
        if (found := head.search(source)) is not None:
            # Future imports must be at the beginning of a program.
            before = "".join(_FUTURE.findall(code)) + source[: found.start()] + "\n"
            # Its last line may be a decorator; a prose prompt is no Python.
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
    """The name in ``code`` of the entry point, or of its class for a method; None if the code does
    not define it.
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
