"""Chat messages -> token ids by a Hugging Face tokenizer's template; users' text stays text."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, Iterator, Mapping, Sequence

from megatron_rl.data.tokenizer_files import ids_of
from megatron_rl.errors import UserError, printable
from megatron_rl.rewards.worker_pool import WorkerPool

if TYPE_CHECKING:
    from megatron_rl.data.problems import Message

#: Limit of processor time for a chat, seconds (it needs a millisecond); the limit of elapsed time
#: is for stuck machines.
_CPU_S, _WALL_S = 10.0, 300.0
#: A template is a program of others: it runs in a worker with limits.
_WORKERS = WorkerPool(
    Path(__file__).with_name("template_worker.py"),
    _CPU_S,
    _WALL_S,
    "expected transformers for chat templates; install it",
)
#: Roles whose text a template may leave out: earlier reasoning, results that it writes as JSON.
_REWRITTEN = ("assistant", "tool")


class ChatTemplate:
    """The template of a tokenizer, and the control tokens that only the template may write.

    ``encode`` gives the ids that ``apply_chat_template`` gives, except where a message holds the
    text of a control token, such as ``<|im_end|>``: that is encoded as text.
    """

    def __init__(self, tokenizer: Any, path: Path) -> None:
        self._tokenizer, self._path = tokenizer, path
        control = [token for token in tokenizer.added_tokens_decoder.values() if token.special]
        control.sort(key=lambda token: -len(token.content))  # the longest first, if two begin alike
        #: matches the text of a control token
        self.control = re.compile("|".join(re.escape(t.content) for t in control) or "(?!)")
        self._strips = {token.content: (token.lstrip, token.rstrip) for token in control}

    def encode(
        self, messages: Sequence[Message], variables: Mapping[str, Any] | None = None
    ) -> list[int]:
        """Token ids of a conversation, with the generation prompt; ``variables``: more variables of
        the template, such as ``tools`` and ``enable_thinking``.

        ``UserError``: there is no template; it does not use a variable, refuses the messages,
        leaves one out, or rewrites text that is not plain for the tokenizer.
        """
        variables = dict(variables or {})
        self._check_used(variables)
        text = self._render(messages, variables)
        self._check_shown(messages, text)
        if not any(self.control.search(part) for part in _texts([*messages, variables])):
            return self._parsed(text)
        return self._with_text_kept(messages, variables, text)

    def _render(self, messages: Sequence[Message], variables: dict[str, Any]) -> str:
        if not self._tokenizer.chat_template:
            raise UserError(
                f"a prompt of chat messages, but {self._path} has no chat template; "
                "expected one in "
                "chat_template.jinja or tokenizer_config.json; add it or use prompts of plain text"
            )
        from transformers import PreTrainedTokenizerBase

        own = type(self._tokenizer).apply_chat_template
        if own is not PreTrainedTokenizerBase.apply_chat_template:
            # The tokenizer's own code, which is trusted (data.tokenizer.trust_remote_code).
            return own(
                self._tokenizer,
                list(messages),
                tokenize=False,
                add_generation_prompt=True,
                **variables,
            )
        names = {**self._tokenizer.special_tokens_map, **variables}
        asked = json.dumps([self._tokenizer.chat_template, names, list(messages)], default=str)
        reply = _WORKERS.ask(asked)
        kind, text = ("refused", reply) if reply in ("late", "killed") else json.loads(reply)
        if kind != "text":
            raise UserError(
                f"chat messages the template of {self._path} refuses: {text}; correct the prompt "
                "or the template"
            )
        return text

    def _check_used(self, variables: Mapping[str, Any]) -> None:
        """Refuse a variable that the template does not name: it would have no effect."""
        source = str(self._tokenizer.chat_template or "")
        unused = [name for name in variables if not re.search(rf"\b{re.escape(name)}\b", source)]
        if source and unused:
            key = "data.tools_key" if unused[0] == "tools" else "data.chat_template_kwargs"
            raise UserError(
                f"the template of {self._path} does not use {printable(repr(unused[0]), 60)}; "
                f"expected a variable that it knows; correct {key}, or the template"
            )

    def _check_shown(self, messages: Sequence[Message], text: str) -> None:
        for number, message in enumerate(messages, start=1):
            if message["role"] not in _REWRITTEN and message["content"].strip() not in text:
                raise UserError(
                    f"the template of {self._path} does not show message {number}, of role "
                    f"{printable(message['role'], 60)!r}; expected all that is asked in the "
                    "prompt; correct the role or the template"
                )

    def _parsed(self, text: str) -> list[int]:
        return self._encode(text, split_special_tokens=False)

    def _as_text(self, text: str) -> list[int]:
        return self._encode(text, split_special_tokens=True)

    def _encode(self, text: str, **options: bool) -> list[int]:
        return ids_of(self._tokenizer, self._path, text, add_special_tokens=False, **options)

    def _as_text_within(self, text: str) -> list[int]:
        """`_as_text` of a piece inside the text: some tokenizers put a space at a beginning."""
        newline, ids = self._as_text("\n"), self._as_text("\n" + text)
        return ids[len(newline) :] if ids[: len(newline)] == newline else self._as_text(text)

    def _with_text_kept(
        self, messages: Sequence[Message], variables: dict[str, Any], text: str
    ) -> list[int]:
        """Marks replace control-token texts in the messages while the template's own control tokens
        are found. Then the pieces in between are encoded as text, with the original texts back in
        place.
        """
        kept: list[str] = []
        mark = _unused_word(text)

        def replace(found: re.Match[str]) -> str:
            kept.append(found[0])
            return f"{mark}{len(kept) - 1}z"

        def restored(piece: str) -> str:
            return re.sub(f"{mark}([0-9]+)z", lambda found: kept[int(found[1])], piece)

        marked = [_replaced(message, self.control, replace) for message in messages]
        marked_text = self._render(marked, _replaced(variables, self.control, replace))
        if restored(marked_text) == text:
            pieces = self._pieces(marked_text)
            for encode in (self._as_text, self._as_text_within):
                # Encoding piece by piece must equal the tokenizer's encoding of the whole.
                if self._joined(pieces, encode) == self._parsed(marked_text):
                    return self._joined([(restored(piece), own) for piece, own in pieces], encode)
        raise UserError(
            f"chat messages with the text of the control token {kept[0]!r}, which cannot be told "
            f"from the template's own by the tokenizer of {self._path}; expected no such text; "
            "drop the line"
        )

    def _pieces(self, text: str) -> list[tuple[str, bool]]:
        """The text cut at its control tokens; True marks a control token."""
        pieces, start = [], 0
        while found := self.control.search(text, start):
            before, behind = text[start : found.start()], found.end()
            left, right = self._strips[found[0]]
            if left:
                before = before.rstrip()
            while right and behind < len(text) and text[behind].isspace():
                behind += 1
            pieces += [(before, False), (text[start + len(before) : behind], True)]
            start = behind
        return [(piece, own) for piece, own in [*pieces, (text[start:], False)] if piece]

    def _joined(
        self, pieces: Sequence[tuple[str, bool]], encode: Callable[[str], list[int]]
    ) -> list[int]:
        ids: list[int] = []
        for number, (piece, own) in enumerate(pieces):
            ids += self._parsed(piece) if own else (encode if number else self._as_text)(piece)
        return ids


def _unused_word(text: str) -> str:
    """A word of letters that the text lacks; a template leaves letters unchanged."""
    word = "q"
    while word in text:
        word += "xq"
    return word


def _texts(value: Any) -> Iterator[str]:
    """Every text in messages, with content parts and arguments of tool calls."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _texts(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _texts(item)


def _replaced(value: Any, pattern: re.Pattern[str], replace: Callable[[re.Match[str]], str]) -> Any:
    """A copy with every match of the pattern replaced."""
    if isinstance(value, str):
        return pattern.sub(replace, value)
    if isinstance(value, dict):
        return {key: _replaced(item, pattern, replace) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_replaced(item, pattern, replace) for item in value]
    return value
