"""Checks the lines of a data set before anything slow is loaded: prompts, chats, reference answers,
and what the verifier needs. No torch, no NumPy, no tokenizer.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable, Mapping, Sequence

from megatron_rl.config.data import ChosenSource, chosen_sources
from megatron_rl.config.json_text import BadJson, parse_json
from megatron_rl.config.schema_data import DataConfig
from megatron_rl.config.template import fill
from megatron_rl.data.sources import Places, records_of_source
from megatron_rl.errors import UserError, printable

#: A message of a chat: "role" and "content", both text, and further keys for the template.
Message = Mapping[str, Any]
#: A prompt: text, or chat messages.
PromptText = str | Sequence[Message]

#: Text that begins like a list of chat messages, in JSON or as printed by Python.
_CHAT_AS_TEXT = re.compile(r"""\s*\[\s*\{\s*["'](role|content)["']\s*:""")
_OBJECT_AS_TEXT = re.compile(r"\s*(?:\[\s*)?\{")
#: Keys of one message, in the spellings of data sets, and of a whole chat.
_MESSAGE_KEYS = ({"role", "content"}, {"from", "value"})
_CHAT_KEYS = ("messages", "conversations")
#: Data sets' names for the assistant's role.
_ANSWERING_ROLES = ("assistant", "model", "gpt", "bot", "chatbot", "ai")


@dataclass(frozen=True)
class Problem:
    """One checked record of a data set."""

    index: int  #: from 0, over all parts
    prompt: PromptText  #: contents of messages are text
    record: Mapping[str, Any]  #: what the verifier gets
    completion: str | None = None  #: the reference answer, if requested
    tools: Sequence[Any] | None = None  #: the tools for the chat template


@dataclass(frozen=True)
class ProblemPart:
    """The problems of one data set of a split."""

    label: str
    weight: float
    first: int  #: index of its first problem
    count: int


@dataclass(frozen=True)
class ProblemFile:
    """A split after reading."""

    path: str  #: name for messages: of one file, or of each part
    problems: list[Problem]
    place: Places  #: the place of a problem, by index
    parts: tuple[ProblemPart, ...]
    #: a note on a change made to lines -> number of lines
    notes: Counter[str] = field(default_factory=Counter)


def read_problems(
    path: Path,
    data: DataConfig,
    check_record: Callable[[Mapping[str, Any]], None] | None = None,
    completions: bool = False,
) -> ProblemFile:
    """All records of one data set, as from `read_sources`; ``path``: as for data.train."""
    (source,) = chosen_sources(data.model_copy(update={"train": Path(path)}), "train")
    return read_sources((source,), check_record, completions)


def read_sources(
    sources: Sequence[ChosenSource],
    check_record: Callable[[Mapping[str, Any]], None] | None = None,
    completions: bool = False,
) -> ProblemFile:
    """All records of the data sets of a split, each checked.

    Args:
        sources: the data sets, with their columns and their rule for chats that end with an answer.
        check_record: raises ``UserError`` if a record lacks what the verifier needs.
        completions: every record must have a reference answer (supervised fine-tuning).

    Raises:
        UserError: as in ``records_of_source``; a prompt that is missing, empty, neither text nor
            chat messages, or a chat that ends with its own answer; a reference answer that is
            missing or no text; a record that ``check_record`` refuses. The message names the place.
    """
    problems: list[Problem] = []
    parts, places = [], Places()
    notes: Counter[str] = Counter()
    for source in sources:
        first = len(problems)
        for record in records_of_source(source, places, first):
            index = len(problems)
            try:
                problem = _problem(index, record, source.columns, completions, notes)
                if check_record is not None:
                    check_record(problem.record)
            except UserError as error:
                raise UserError(f"{places(index)}: {error}") from error
            problems.append(problem)
        parts.append(ProblemPart(source.label, source.weight, first, len(problems) - first))
    path = ", ".join(str(source.path) for source in sources)
    return ProblemFile(path, problems, places, tuple(parts), notes)


def parse_prompt(prompt: Any, key: str, notes: Counter[str]) -> PromptText:
    """A prompt as in a record -> text, or messages whose contents are text.

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
    prompt, key = _prompt_of(record, data, notes)
    completion = None
    if not isinstance(prompt, str) and prompt[-1]["role"].casefold() in _ANSWERING_ROLES:
        prompt, reference = _without_answer(prompt, data)
        answer = data.completion_key if completions else "answer"
        # The record's own answer takes precedence; its prompt no longer holds the answer.
        record = {answer: reference, **record, key: prompt}
        notes["chats that ended with the assistant's answer, taken as the reference"] += 1
    if data.template is not None:
        record = {"prompt": prompt, **record}  # verifiers read the problem's text there
    if data.system is not None:
        prompt = _with_system(prompt, data.system, notes)
    if completions:
        completion = _value_of(record, data.completion_key)
        if not isinstance(completion, str):
            kind = type(completion).__name__
            raise UserError(f"{data.completion_key!r} is {kind}; expected text; correct the line")
    elif data.answer_key is not None:
        record = {**record, "answer": _value_of(record, data.answer_key)}
    tools = None if data.tools_key is None else _tools(record, data.tools_key)
    return Problem(index, prompt, record, completion, tools)


def _prompt_of(
    record: Mapping[str, Any], data: DataConfig, notes: Counter[str]
) -> tuple[PromptText, str]:
    """The prompt, and its key."""
    if data.template is None:
        return parse_prompt(_value_of(record, data.prompt_key), data.prompt_key, notes), (
            data.prompt_key
        )
    # unchanged: a template that begins like a chat is no chat
    return fill(data.template, lambda column: _value_of(record, column)), "prompt"


def _with_system(prompt: PromptText, system: str, notes: Counter[str]) -> PromptText:
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    elif any(message["role"] == "system" for message in prompt):
        notes["chats with their own system message, which is kept"] += 1
        return prompt
    return [{"role": "system", "content": system}, *prompt]


def _tools(record: Mapping[str, Any], key: str) -> Sequence[Any] | None:
    """The tools of a record, a list of objects or its JSON text; None: it has none."""
    tools = _value_of(record, key)
    if isinstance(tools, str) and tools:
        try:
            tools = parse_json(tools)
        except BadJson as error:
            raise UserError(
                f"{key!r} is text that is no JSON ({error}); expected a list of tools; correct the "
                "line"
            ) from error
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise UserError(
            f"{key!r} is {_shown(tools)}; expected a list of tools, each a JSON schema, or null; "
            "correct the line"
        )
    return tools


def _without_answer(prompt: Sequence[Message], data: DataConfig) -> tuple[Sequence[Message], str]:
    """The messages before the assistant's last turn, and the content of that turn."""
    if data.last_turn == "refuse":
        raise UserError(
            f"{data.prompt_key!r} ends with a message of the {prompt[-1]['role']}: the prompt "
            "would hold the answer; expected the user's turn last; drop that message, or set "
            "data.last_turn reference to take it as the reference answer"
        )
    if len(prompt) == 1:
        raise UserError(
            f"{data.prompt_key!r} holds only a message of the assistant; expected a user message "
            "before it; correct the line"
        )
    return prompt[:-1], prompt[-1]["content"]


def _value_of(record: Mapping[str, Any], key: str) -> Any:
    """The value of a column; for a key with dots that is no column, the value below one."""
    found: Any = record
    for part in (key,) if key in record else key.split("."):
        if not isinstance(found, Mapping) or part not in found:
            columns = printable(", ".join(record)) or "no keys"
            raise UserError(
                f"no {key!r} among {columns}; expected it in every line; "
                "correct the line, or the key or template of the section data"
            )
        found = found[part]
    return found


def _is_chat(text: str) -> bool:
    """Whether a text is, or begins like, chat messages stored as text."""
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
            f"{key!r} is text that looks like chat messages but is no JSON list of them: "
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
        content = ""  # chat APIs write a turn that only calls tools like this
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
