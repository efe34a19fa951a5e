"""The one way from text to tokens, of prompts and reference answers, for training, fine-tuning,
evaluation, ``generate`` and the preview.
"""

from __future__ import annotations

from collections import Counter
from typing import Any, Literal, Mapping, Sequence

from megatron_rl.data.problems import PromptText
from megatron_rl.data.tokenizers import Tokenizer
from megatron_rl.errors import UserError

#: Values of ``data.chat``.
ChatMode = Literal["auto", "template", "plain", "rendered"]


class Rendering:
    """A tokenizer with the mode ``data.chat``.

    Raises ``UserError`` if the tokenizer lacks what the mode needs.
    """

    def __init__(
        self, tokenizer: Tokenizer, chat: ChatMode, variables: Mapping[str, Any] | None = None
    ) -> None:
        """variables: more variables of the chat template (``data.chat_template_kwargs``)."""
        self.tokenizer, self.chat = tokenizer, chat
        self._variables = dict(variables or {})
        if chat == "template" and not tokenizer.has_chat_template:
            raise UserError(
                "data.chat is template and the tokenizer has no chat template; expected one in "
                "chat_template.jinja or tokenizer_config.json; add it or set data.chat plain"
            )
        if chat == "rendered":
            tokenizer.encode("", control=True)  # refused by tokenizers without this mode

    def prompt(
        self, prompt: PromptText, notes: Counter[str], tools: Sequence[Any] | None = None
    ) -> tuple[list[int], str]:
        """Token ids of a prompt, and its text as the model sees it: with the template's control
        tokens, without the beginning-of-sequence token that the tokenizer puts before plain text.

        ``UserError``: a chat in place of text, or a chat that the template refuses.
        """
        tokenizer = self.tokenizer
        if tools is not None and isinstance(prompt, str) and self.chat != "template":
            raise UserError(
                f"a prompt of text with tools, and data.chat is {self.chat}; expected chat "
                "messages, whose template shows tools; set data.chat template, or leave "
                "data.tools_key out"
            )
        if isinstance(prompt, str):
            if self.chat == "rendered":
                ids = tokenizer.encode(prompt, control=True)
                return ids, tokenizer.show(ids)
            self._note_control(prompt, notes)
            if self.chat != "template":
                ids = tokenizer.encode_prompt(prompt)
                begun = bool(ids) and ids[0] == tokenizer.bos_id
                return ids, tokenizer.show(ids[1:] if begun else ids)
            prompt = [{"role": "user", "content": prompt}]
        else:
            if self.chat in ("plain", "rendered"):
                raise UserError(
                    f"a prompt of chat messages, and data.chat is {self.chat}; expected text; "
                    "set data.chat auto"
                )
            self._note_control(" ".join(message["content"] for message in prompt), notes)
        tools_given = {} if tools is None else {"tools": list(tools)}
        ids = tokenizer.encode_prompt(prompt, {**self._variables, **tools_given})
        return ids, tokenizer.show(ids)

    def completion(self, text: str, notes: Counter[str]) -> list[int]:
        """Token ids of a reference answer. They end with one end-of-sequence token, also if the
        text ends with it.
        """
        tokenizer = self.tokenizer
        end = tokenizer.show([tokenizer.eos_id])
        bare = text
        while end and bare.rstrip().endswith(end):
            bare = bare.rstrip().removesuffix(end)
        if bare != text:
            notes[f"answers that ended with the text {end}: it is kept once"] += 1
        if self.chat != "rendered":
            self._note_control(bare, notes)
        return [*tokenizer.encode(bare, control=self.chat == "rendered"), tokenizer.eos_id]

    def facts(self, prompts: Counter[type]) -> str:
        """Describes how prompts of these kinds (``str`` or ``list``) reach the model."""
        if self.chat == "rendered":
            return "text with the control tokens in it (data.chat rendered)"
        ways = []
        if prompts[list]:
            ways.append("chat messages through the tokenizer's template")
        if prompts[str] and self.chat == "template":
            ways.append("text as a user message, through the tokenizer's template")
        elif prompts[str]:
            unused = self.tokenizer.has_chat_template
            without = " without the tokenizer's chat template" if unused else ""
            ways.append(f"text as it stands{without}")
        return f"{'; '.join(ways)} (data.chat {self.chat})"

    def _note_control(self, text: str, notes: Counter[str]) -> None:
        if self.tokenizer.find_control(text) is not None:
            notes["texts that hold the text of a control token: it is text to the model"] += 1
