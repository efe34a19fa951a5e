"""Collects the stop tokens: the tokenizer's end-of-sequence token, those that the model's Hugging
Face directory names, and those of the configuration.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Iterable, Mapping

from megatron_rl.config.json_text import read_json_object
from megatron_rl.errors import UserError

#: The file with stop tokens; inference engines read it before config.json.
GENERATION_CONFIG = "generation_config.json"
KEY = "eos_token_id"


def stop_tokens(
    eos_id: int, directories: Iterable[Path], more: Mapping[int, str], vocab_size: int
) -> dict[int, str]:
    """Every stop token, with the first source that names it.

    Args:
        eos_id: the tokenizer's end-of-sequence token.
        directories: Hugging Face model directories; see `read_stop_ids`.
        more: stop tokens of the configuration, each with the key that names it.
        vocab_size: rows of the model's embedding.

    Raises:
        UserError: a file is not understood, or a token is outside the vocabulary.
    """
    found = {eos_id: "tokenizer"}
    for directory in directories:
        for token, file in read_stop_ids(directory).items():
            _check_in_vocabulary(token, f"{file}: {KEY}", vocab_size)
            found.setdefault(token, file.name)
    for token, key in more.items():
        _check_in_vocabulary(token, key, vocab_size)
        found.setdefault(token, key)
    _check_in_vocabulary(eos_id, "the tokenizer's end-of-sequence token", vocab_size)
    return found


def read_stop_ids(directory: Path) -> dict[int, Path]:
    """The stop tokens of a Hugging Face model directory, each with the first file that names it:
    generation_config.json, then config.json. Either may be missing, or name none.

    Raises:
        UserError: a file is no JSON object, or its eos_token_id neither a token nor a list of them.
    """
    found: dict[int, Path] = {}
    for file in (directory / GENERATION_CONFIG, directory / "config.json"):
        for token in stop_ids_of(file):
            found.setdefault(token, file)
    return found


def stop_ids_of(file: Path) -> list[int]:
    """The stop tokens in one file, in order; [] if the file is missing. Raises as
    `read_stop_ids`.
    """
    value = read_json(file).get(KEY)
    tokens = value if isinstance(value, list) else [] if value is None else [value]
    # true is an int in Python, but not in JSON
    if any(type(token) is not int or token < 0 for token in tokens):
        raise UserError(
            f"{file}: {KEY} is {json.dumps(value)[:80]}; expected a token id, a list of them or "
            "null; correct the file"
        )
    return tokens


def read_json(file: Path) -> Mapping[str, Any]:
    """The object in a JSON file; {} if the file is missing. UserError: it holds something else."""
    return read_json_object(file, "a JSON object") if os.path.exists(file) else {}


def _check_in_vocabulary(token: int, place: str, vocab_size: int) -> None:
    if not 0 <= token < vocab_size:
        raise UserError(
            f"{place} names the token {token}; expected ids below model.vocab_size {vocab_size}; "
            "an answer can never end with it: correct the id, or model.vocab_size"
        )
