"""The small files of a Hugging Face model directory: configuration, tokenizer, chat template.

A run that starts from such a directory keeps them in ``RUN_DIR/hf``, so that what comes out of it
can be exported with the files it came with.
"""

from __future__ import annotations

import shutil
from pathlib import Path

FOLDER = "hf"
COPIED = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "vocab.json",
    "merges.txt",
)


def copy_companions(source: Path, target: Path) -> list[str]:
    """Copy those of the files that are there, verbatim; their names."""
    found = [name for name in COPIED if (source / name).is_file()]
    for name in found:
        shutil.copyfile(source / name, target / name)
    return found


def keep_companions(source: Path, run_dir: Path) -> None:
    """Copy them into a run's directory."""
    (run_dir / FOLDER).mkdir(exist_ok=True)
    copy_companions(source, run_dir / FOLDER)


def kept_companions(run_dir: Path) -> Path | None:
    """The folder of a run's directory that holds them, if it has one."""
    folder = run_dir / FOLDER
    return folder if (folder / "config.json").is_file() else None
