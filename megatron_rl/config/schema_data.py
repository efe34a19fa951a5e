"""The section ``data``."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from megatron_rl.config.section import Section


class TokenizerConfig(Section):
    """The tokenizer."""

    kind: Literal["sentencepiece", "huggingface"] = "sentencepiece"
    """sentencepiece: a .model file; huggingface: a directory, or a tokenizer.json."""
    path: Path | None = None
    """The file or directory."""
    trust_remote_code: bool = False
    """huggingface: execute the Python code that a directory's tokenizer brings along; false: a
    tokenizer that needs code of its own is refused."""


class DataPart(Section):
    """One data set of several; keys that are null are those of ``data``."""

    path: Path
    """A file, a directory, hf:ORGANISATION/NAME, or a source of your own: see ``data.train``."""
    format: str | None = None
    """The format of its files: a name of `megatron-rl list sources`; null: by the files' names."""
    settings: dict[str, Any] = {}
    """Settings of the format, or of your own source, that differ from its defaults."""
    weight: float = Field(1.0, gt=0.0)
    """Its share of the drawn problems, relative to the weights of the other parts."""
    label: str | None = None
    """Its name in metrics, data/LABEL (reward) and share/LABEL; null: made from the path."""
    prompt_key: str | None = None
    """Column of the prompt."""
    template: str | None = None
    """Text of the prompt, with columns in braces."""
    system: str | None = None
    """System message before the prompt."""
    answer_key: str | None = None
    """Column of what the verifier compares with."""
    completion_key: str | None = None
    """Column of the reference answer (supervised fine-tuning)."""
    tools_key: str | None = None
    """Column of the tools that the chat template gets."""


class DataConfig(Section):
    """Prompts and the packing of sequences."""

    tokenizer: TokenizerConfig = TokenizerConfig()
    """The tokenizer."""
    train: Path | tuple[DataPart, ...] | None = None
    """Training problems: a file (JSONL, CSV or TSV, also .gz and .zst; Parquet), a directory of
    these, a Hugging Face dataset (saved on disk, or hf:ORGANISATION/NAME@REVISION/SPLIT), a source
    of your own, ./my_source.py:my_source; or a list of these with weights and columns."""
    eval: Path | tuple[DataPart, ...] | None = None
    """Held-out problems, named as in train; a list uses all problems and ignores weights; null: no
    evaluation."""
    prompt_key: str = "prompt"
    """Column of the prompt: a string, or a list of chat messages. A key within a key: a.b."""
    template: str | None = None
    """Text of the prompt in place of prompt_key, with columns in braces: "Problem: {question}";
    double braces are braces."""
    system: str | None = None
    """System message for prompts that have none; a text prompt becomes the user's message."""
    answer_key: str | None = None
    """Column that the verifier gets as ``answer``; null: the column of that name."""
    chat: Literal["auto", "template", "plain", "rendered"] = "auto"
    """auto: chat messages through the tokenizer's template, text as it is; template: text too, as
    one user message; plain: text only, chats are refused; rendered: text that holds the template's
    control tokens already, nothing is added. In the other three, control tokens in a prompt are
    text."""
    chat_template_kwargs: dict[str, Any] = {}
    """More variables of the chat template, such as enable_thinking."""
    tools_key: str | None = None
    """Column of the tools that the chat template gets, a list of JSON schemas; null: none."""
    last_turn: Literal["refuse", "reference"] = "refuse"
    """Chats whose last message is the assistant's. reference: that message is not part of the
    prompt; it is the completion (sft) or ``answer`` (train, evaluate), if the record lacks one."""
    overlong: Literal["refuse", "skip"] = "refuse"
    """Lines that are too long for model.max_sequence_length; skip: leave them out and count
    them."""
    completion_key: str = "completion"
    """Column of the reference answer (supervised fine-tuning)."""
    shuffle: bool = True
    """Draw the problems of each epoch in a seeded random order."""
    pack_tokens: int = Field(4096, ge=8)
    """Most tokens of a pack (micro-batch); no sequence may be longer."""
    pack_multiple: int = Field(32, ge=1)
    """Packs are as short as the batch allows, rounded up to this many tokens."""
    share_prompts: Literal["auto", "on", "off"] = "auto"
    """Sequences of a pack that begin with the same prompt share its tokens, where that saves 3% of
    them or more: the model runs them once, with the same results. auto: on, but off with
    Transformer Engine's attention, which cannot do it (and where on is refused)."""
