"""The lines of a data set, checked before anything slow is loaded: prompts, chats, reference
answers, and what the verifier needs. No torch, no NumPy, no tokenizer.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable, Mapping, Sequence

from megatron_rl.config.json_text import BadJson, parse_json
from megatron_rl.config.schema import DataConfig
from megatron_rl.data.jsonl import load_records, place
from megatron_rl.errors import UserError, printable

#: A message of a chat: "role" and "content", both text, and what else a template may want.
Message = Mapping[str, Any]
#: A prompt: text, or chat messages.
PromptText = str | Sequence[Message]

#: Text that begins as a list of chat messages does, in JSON or as Python prints one.
_CHAT_AS_TEXT = re.compile(r"""\s*\[\s*\{\s*["'](role|content)["']\s*:""")
_OBJECT_AS_TEXT = re.compile(r"\s*(?:\[\s*)?\{")
#: Keys of one message, as data sets write them, and of a whole chat.
_MESSAGE_KEYS = ({"role", "content"}, {"from", "value"})
_CHAT_KEYS = ("messages", "conversations")
#: Roles that data sets give the one who answers.
_ANSWERING_ROLES = ("assistant", "model", "gpt", "bot", "chatbot", "ai")


@dataclass(frozen=True)
class Problem:
    """One checked line of a data set."""

    index: int  #: from 0
    prompt: PromptText  #: contents of messages are text
    record: Mapping[str, Any]  #: what the verifier is given
    completion: str | None = None  #: the reference answer, where one was asked for


@dataclass(frozen=True)
class ProblemFile:
    """A data set file that was read."""

    path: Path
    problems: list[Problem]
    #: how often something was done to a line that people may want to know of -> how many lines
    notes: Counter[str] = field(default_factory=Counter)


def read_problems(
    path: Path,
    data: DataConfig,
    check_record: Callable[[Mapping[str, Any]], None] | None = None,
    completions: bool = False,
) -> ProblemFile:
    """All lines of a JSONL file, each checked.

    Args:
        path: the file.
        data: its keys, and what is to become of chats that end with an answer.
        check_record: raises ``UserError`` where a record lacks what the verifier needs.
        completions: every line has a reference answer (supervised fine-tuning).

    Raises:
        UserError: as in ``load_records``; a prompt that is missing, empty, neither text nor chat
            messages, or a chat that ends with its own answer; a reference answer that is missing
            or no text; a record that ``check_record`` refuses. File and line are named.
    """
    found = ProblemFile(Path(path), [])
    for index, record in enumerate(load_records(found.path)):
        try:
            problem = _problem(index, record, data, completions, found.notes)
            if check_record is not None:
                check_record(problem.record)
        except UserError as error:
            raise UserError(f"{place(found.path, index)}: {error}") from error
        found.problems.append(problem)
    return found


def parse_prompt(prompt: Any, key: str, notes: Counter[str]) -> PromptText:
    """A prompt as it stands in a record -> text, or messages whose contents are text.

    A chat that is stored as JSON text becomes messages; a content of text parts becomes their text.
    ``UserError`` for anything else, without file and line.
    """
    if isinstance(prompt, str) and _is_chat(prompt):
        prompt = _chat_from_text(prompt, key)
        notes["chats stored as JSON text, read as chats"] += 1
    if isinstance(prompt, str) and prompt:
        return prompt
    if not prompt or not isinstance(prompt, list):
        raise UserError(
            f"{key!r} is {_shown(prompt)}; expected text or a list of chat messages with "
            "role and content, not empty; correct the line"
        )
    return [_message(message, n, key) for n, message in enumerate(prompt, start=1)]


def _problem(
    index: int,
    record: Mapping[str, Any],
    data: DataConfig,
    completions: bool,
    notes: Counter[str],
) -> Problem:
    prompt = parse_prompt(_value_of(record, data.prompt_key), data.prompt_key, notes)
    completion = None
    if not isinstance(prompt, str) and prompt[-1]["role"].casefold() in _ANSWERING_ROLES:
        prompt, reference = _without_answer(prompt, data)
        key = data.completion_key if completions else "answer"
        # What the record says itself goes first; its prompt no longer holds the answer.
        record = {key: reference, **record, data.prompt_key: prompt}
        notes["chats that ended with the assistant's answer, taken as the reference"] += 1
    if completions:
        completion = _value_of(record, data.completion_key)
        if not isinstance(completion, str):
            kind = type(completion).__name__
            raise UserError(f"{data.completion_key!r} is {kind}; expected text; correct the line")
    return Problem(index, prompt, record, completion)


def _without_answer(prompt: Sequence[Message], data: DataConfig) -> tuple[Sequence[Message], str]:
    """The messages before the assistant's last turn, and what that turn says."""
    if data.last_turn == "refuse":
        raise UserError(
            f"{data.prompt_key!r} ends with a message of the {prompt[-1]['role']}: the answer "
            "would stand in the prompt; expected the user's turn last; drop that message, or set "
            "data.last_turn reference to take it as the reference answer"
        )
    if len(prompt) == 1:
        raise UserError(
            f"{data.prompt_key!r} holds a message of the assistant alone; expected a question "
            "before it; correct the line"
        )
    return prompt[:-1], prompt[-1]["content"]


def _value_of(record: Mapping[str, Any], key: str) -> Any:
    if key not in record:
        found = printable(", ".join(record)) or "no keys"
        raise UserError(
            f"no {key!r} among {found}; expected it in every line; "
            "correct the line or set data.prompt_key and data.completion_key"
        )
    return record[key]


def _is_chat(text: str) -> bool:
    """Whether a text is, or begins as, chat messages that were stored as text."""
    if _CHAT_AS_TEXT.match(text):
        return True
    if not _OBJECT_AS_TEXT.match(text):
        return False
    try:
        value = parse_json(text)
    except BadJson:
        return False
    if isinstance(value, dict) and any(isinstance(value.get(key), list) for key in _CHAT_KEYS):
        return True
    messages = value if isinstance(value, list) else [value]
    return all(
        isinstance(message, dict) and any(keys <= message.keys() for keys in _MESSAGE_KEYS)
        for message in messages
    )


def _chat_from_text(text: str, key: str) -> list[Any]:
    try:
        chat = parse_json(text)
    except BadJson:
        chat = None
    if not isinstance(chat, list):
        raise UserError(
            f"{key!r} is text that is like chat messages and no list of them in JSON: "
            f"{_shown(text)}; expected a list, or the text of one in JSON; correct the line"
        )
    return chat


def _message(message: Any, number: int, key: str) -> Message:
    """A message with its content as text."""
    where = f"message {number} of {key!r}"
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise UserError(
            f"{where} is {_shown(message)}; expected an object with role and content; "
            "correct the line"
        )
    role = message["role"]
    content = message.get("content")
    if content is None and role == "assistant" and message.get("tool_calls"):
        content = ""  # as chat APIs write a turn that only calls tools
    if isinstance(content, list) and content:
        content = "".join(_part(part, where) for part in content)
    if not isinstance(content, str):
        raise UserError(
            f"{where} has the content {_shown(content)}; expected text, or a list of parts of "
            "type text; correct the line"
        )
    if role == "user" and not content.strip():
        raise UserError(f"{where} is the user's and empty; expected text; correct the line")
    return {**message, "content": content}


def _part(part: Any, where: str) -> str:
    if isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return part["text"]
    kind = part.get("type") if isinstance(part, dict) else None
    of_type = f"a part of type {printable(str(kind), 60)}"
    found = of_type if kind not in (None, "text") else f"the part {_shown(part)}"
    raise UserError(
        f'{where} has {found}; expected parts {{"type": "text", "text": ...}} alone; '
        "drop the part or the line"
    )


def _shown(value: Any) -> str:
    return json.dumps(value)[:60]
