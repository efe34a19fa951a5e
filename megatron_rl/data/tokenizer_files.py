"""Checks the files of a Hugging Face tokenizer before libraries read them, and turns errors of
these libraries into one line.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any, Iterator

from megatron_rl.config.json_text import read_json_object
from megatron_rl.errors import Stopped, UserError, printable

#: Limit of tokenizer.json and vocab.json, bytes; the largest known ones have 35 million.
MOST_BYTES = 256 << 20
_JSON = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "chat_template.json",
    "config.json",
)
_OTHERS = ("chat_template.jinja", "merges.txt", "vocab.txt", "tokenizer.model", "spiece.model")
#: What a Hugging Face tokenizer may read beside its tokenizer.json.
BESIDE = (*_JSON, *_OTHERS)
_REMEDY = "expected the files of a Hugging Face tokenizer; correct data.tokenizer.path"


def check_tokenizer_files(folder: Path, tokenizer_json: Path) -> None:
    """Raise ``UserError`` if a file is no regular file, or does not hold what its name promises;
    see also `read_json_object`.
    """
    for name in BESIDE:
        path = folder / name
        if path.exists() and not path.is_file():  # reading a pipe would wait for ever
            raise UserError(f"{path} is no regular file; {_REMEDY}")
        if path.exists() and name in _JSON:
            read_json_object(path, "a JSON object of a tokenizer", MOST_BYTES)
    if tokenizer_json.exists():
        content = read_json_object(tokenizer_json, "a Hugging Face fast tokenizer", MOST_BYTES)
        if not isinstance(content.get("model"), dict):
            raise UserError(
                f"{tokenizer_json} is not the file of a Hugging Face fast tokenizer; expected a "
                "JSON object with the key 'model'; correct data.tokenizer.path"
            )
        _check_merges(tokenizer_json, content["model"])


def _check_merges(path: Path, model: dict[str, Any]) -> None:
    """With ``continuing_subword_prefix``, tokenizers 0.23 cuts as many bytes off what a merge adds,
    without looking at them: if it cuts a character in half, it aborts the process.
    """
    prefix, merges = model.get("continuing_subword_prefix"), model.get("merges")
    if not isinstance(prefix, str) or not prefix or not isinstance(merges, list):
        return
    for number, merge in enumerate(merges):
        parts = merge.split(" ") if isinstance(merge, str) else merge
        added = parts[-1] if isinstance(parts, list) and parts else None
        if not isinstance(added, str) or not added.startswith(prefix):
            raise UserError(
                f"{path} has continuing_subword_prefix {printable(repr(prefix), 40)} and a merge "
                f"(number {number}) whose second part does not begin with it; {_REMEDY}"
            )


@contextlib.contextmanager
def understood(path: Path, doing: str) -> Iterator[None]:
    """A context in which errors of transformers and tokenizers become a ``UserError``."""
    try:
        yield
    except (UserError, Stopped):
        raise
    # tokenizers (Rust) raises plain Exception, and its panics are not even an Exception.
    except BaseException as error:  # noqa: BLE001
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise _refusal(path, doing, error) from error


def _refusal(path: Path, doing: str, error: BaseException) -> UserError:
    if "trust_remote_code" in str(error):
        return UserError(
            f"{path} has a tokenizer that needs code of its own, which is in the directory; "
            "expected one that transformers has a class for; if you trust that code, set "
            "data.tokenizer.trust_remote_code to true"
        )
    text = " ".join(str(error).split())[:200] or type(error).__name__
    said = text.encode("utf-8", "backslashreplace").decode("utf-8")
    return UserError(f"{path} cannot be {doing} as a Hugging Face tokenizer ({said}); {_REMEDY}")


def ids_of(tokenizer: Any, path: Path, text: str, **options: Any) -> list[int]:
    """Token ids of a text by transformers' tokenizer from ``path``. ``UserError``: it fails."""
    with understood(path, "used"):
        # verbose: it would warn of long texts, which are checked line by line later
        return tokenizer.encode(text, verbose=False, **options)
