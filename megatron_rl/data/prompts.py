"""Data sets: JSONL files of problems and of samples, and a cursor over problems that can be saved
and resumed.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any, Generic, Mapping, Sequence, TypeVar

import numpy as np

from megatron_rl.data.tokenizers import PromptText, Tokenizer
from megatron_rl.errors import UserError
from megatron_rl.records import Prompt, Sample

Item = TypeVar("Item")


def load_records(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSONL file in order; blank lines at the end are allowed, and nowhere else.

    ``UserError`` names the file and the line (from 1): no file, not UTF-8, no JSON, not an object,
    no line at all.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(
            f"data set {path} does not exist; expected a JSONL file; "
            "correct data.train or data.eval"
        )
    try:
        text = path.read_bytes().decode("utf-8").rstrip()
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: byte {error.start} is not UTF-8; expected a JSONL file in UTF-8; convert it"
        ) from error
    if not text:
        raise UserError(
            f"{path}: empty data set; expected one JSON object a line; "
            "fill the file or name another"
        )
    # Not splitlines(): JSON text may hold U+2028 and its like unescaped.
    return [
        _parse_line(path, number, line) for number, line in enumerate(text.split("\n"), start=1)
    ]


def load_prompts(
    path: Path, tokenizer: Tokenizer, prompt_key: str, max_prompt_tokens: int
) -> list[Prompt]:
    """The problems of a JSONL file; ``index`` counts lines from 0.

    ``UserError`` as in ``load_records``, and where the prompt is missing, neither text nor chat
    messages, empty, or longer than ``max_prompt_tokens``.
    """
    prompts = []
    for index, record in enumerate(load_records(path)):
        prompt = _prompt_of(path, index, record, prompt_key)
        tokens = tokenizer.encode_prompt(prompt)
        _check_length(path, index, "prompt", len(tokens), max_prompt_tokens)
        prompts.append(Prompt(index, np.array(tokens, dtype=np.int64), _as_text(prompt), record))
    return prompts


def load_samples(
    path: Path, tokenizer: Tokenizer, prompt_key: str, completion_key: str, max_tokens: int
) -> list[Sample]:
    """The samples of a JSONL file for supervised fine-tuning.

    Every completion ends with the end-of-sequence token.
    ``UserError`` as in ``load_prompts``, with ``max_tokens`` as the limit of prompt and completion
    together, and where the completion is missing or not text.
    """
    samples = []
    for index, record in enumerate(load_records(path)):
        prompt = tokenizer.encode_prompt(_prompt_of(path, index, record, prompt_key))
        completion = _value_of(path, index, record, completion_key)
        if not isinstance(completion, str):
            kind = type(completion).__name__
            raise UserError(
                f"{_place(path, index)}: {completion_key!r} is {kind}; expected text; "
                "correct the line"
            )
        tokens = prompt + tokenizer.encode(completion) + [tokenizer.eos_id]
        _check_length(path, index, "prompt and completion", len(tokens), max_tokens)
        samples.append(Sample(np.array(tokens, dtype=np.int64), prompt_length=len(prompt)))
    return samples


def number_occurrences(prompts: Sequence[Prompt], drawn: Counter[int]) -> list[Prompt]:
    """The prompts, each knowing how often its step has drawn it before.

    ``drawn`` counts the draws of the step by ``index``; those of these prompts are added.
    """
    numbered = []
    for prompt in prompts:
        numbered.append(replace(prompt, occurrence=drawn[prompt.index]))
        drawn[prompt.index] += 1
    return numbered


class PromptSource(Generic[Item]):
    """An endless, resumable cursor over prompts (or samples), the same on every rank.

    Epoch e draws all prompts once, in the order of a permutation that depends on (seed, e) only;
    batches run across the end of an epoch. The place of the cursor is the whole state.
    """

    def __init__(self, prompts: Sequence[Item], seed: int, shuffle: bool) -> None:
        if not prompts:
            raise ValueError("no prompts")
        self._prompts = tuple(prompts)
        self._seed = seed
        self._shuffle = shuffle
        self._epoch = 0
        self._offset = 0  # prompts of this epoch already drawn
        self._order = self._order_of(0)

    def next_batch(self, n: int) -> list[Item]:
        """The next n prompts; one occurs twice only where a new epoch begins within the batch."""
        batch: list[Item] = []
        while len(batch) < n:
            if self._offset == len(self._prompts):
                self._epoch, self._offset = self._epoch + 1, 0
                self._order = self._order_of(self._epoch)
            taken = self._order[self._offset : self._offset + n - len(batch)]
            batch += [self._prompts[place] for place in taken]
            self._offset += len(taken)
        return batch

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers, fit for JSON."""
        return {
            "epoch": self._epoch,
            "offset": self._offset,
            "seed": self._seed,
            "shuffle": self._shuffle,
            "size": len(self._prompts),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues where ``state`` was taken; ``UserError`` on another data set, seed or order."""
        for key, here in (
            ("size", len(self._prompts)),
            ("seed", self._seed),
            ("shuffle", self._shuffle),
        ):
            if state[key] != here:
                raise UserError(
                    f"checkpoint with {key} {state[key]} of the prompts, here {here}; "
                    "resuming expects the same data, seed and order; "
                    "restore data.train, seed and data.shuffle, or start a new run with "
                    "checkpoint.init_from"
                )
        self._epoch, self._offset = int(state["epoch"]), int(state["offset"])
        self._order = self._order_of(self._epoch)

    def _order_of(self, epoch: int) -> np.ndarray:
        if not self._shuffle:
            return np.arange(len(self._prompts))
        generator = np.random.Generator(
            np.random.PCG64(np.random.SeedSequence([self._seed, epoch]))
        )
        return generator.permutation(len(self._prompts))


def _parse_line(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        raise UserError(
            f"{path}, line {number}: not JSON ({error}); expected one object a line; correct it"
        ) from error
    if not isinstance(record, dict):
        kind = type(record).__name__
        raise UserError(
            f"{path}, line {number}: a JSON {kind}; expected an object {{...}}; correct the line"
        )
    return record


def _place(path: Path, index: int) -> str:
    return f"{path}, line {index + 1}"


def _value_of(path: Path, index: int, record: Mapping[str, Any], key: str) -> Any:
    if key not in record:
        found = ", ".join(record) or "no keys"
        raise UserError(
            f"{_place(path, index)}: no {key!r} among {found}; expected it in every line; "
            "correct the line or set data.prompt_key and data.completion_key"
        )
    return record[key]


def _prompt_of(path: Path, index: int, record: Mapping[str, Any], key: str) -> PromptText:
    prompt = _value_of(path, index, record, key)
    is_chat = isinstance(prompt, list) and all(
        isinstance(message, dict) and isinstance(message.get("role"), str) and "content" in message
        for message in prompt
    )
    if not prompt or not (isinstance(prompt, str) or is_chat):
        raise UserError(
            f"{_place(path, index)}: {key!r} is {json.dumps(prompt)[:60]}; "
            "expected text or a list of chat messages with "
            "role and content, not empty; correct the line"
        )
    return prompt


def _check_length(path: Path, index: int, what: str, length: int, limit: int) -> None:
    if length == 0:
        raise UserError(
            f"{_place(path, index)}: the {what} has no tokens; expected at least one; "
            "correct the line"
        )
    if length > limit:
        raise UserError(
            f"{_place(path, index)}: {what} of {length} tokens; expected at most {limit}; "
            "shorten it, drop the line or raise model.max_sequence_length"
        )


def _as_text(prompt: PromptText) -> str:
    if isinstance(prompt, str):
        return prompt
    return "\n".join(f"{message['role']}: {message['content']}" for message in prompt)
