"""The small files of a Hugging Face model directory: configuration, tokenizer, chat template.

A run that starts from such a directory keeps them in ``RUN_DIR/hf``, so that what comes out of it
can be exported with the files it came with. Every run keeps there at which tokens its answers end.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Sequence

from megatron_rl.config.stop_tokens import GENERATION_CONFIG, KEY, read_json, stop_ids_of
from megatron_rl.files import write_whole

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


def copy_side_files(source: Path, target: Path) -> list[str]:
    """Copy those of the files that are there, verbatim; their names."""
    found = [name for name in COPIED if (source / name).is_file()]
    for name in found:
        write_whole(target / name, (source / name).read_bytes())  # never through a link
    return found


def keep_side_files(source: Path | None, run_dir: Path, stop_ids: Sequence[int] = ()) -> None:
    """Copy them into a run's directory; what is kept there names the run's stop tokens.

    Args:
        source: the directory they are in, which may be the one where they are kept; None: there is
            none, and only stop tokens are kept.
        run_dir: it is there.
        stop_ids: all at which the run's answers end; none: what the files say stays.
    """
    folder = run_dir / FOLDER
    folder.mkdir(exist_ok=True)
    if source is None:
        (folder / GENERATION_CONFIG).unlink(missing_ok=True)  # of an earlier start of the run
    elif source.resolve() != folder.resolve():
        copy_side_files(source, folder)
    _name_stop_ids(folder, stop_ids)


def _name_stop_ids(folder: Path, stop_ids: Sequence[int]) -> None:
    """Whoever generates with these files is to stop where the run's answers do: also where a run
    that is continued has other stop tokens than before.
    """
    file = folder / GENERATION_CONFIG
    named = stop_ids_of(file) or stop_ids_of(folder / "config.json")
    if stop_ids and set(named) != set(stop_ids):
        known = [token for token in named if token in stop_ids]
        content = {**read_json(file), KEY: list(dict.fromkeys([*known, *stop_ids]))}
        write_whole(file, json.dumps(content, indent=2) + "\n")


def run_of(path: Path) -> Path:
    """The run's directory, of itself, of its checkpoints directory or of a step_N in that."""
    path = path.resolve()
    if path.parent.name == "checkpoints":
        return path.parent.parent
    return path.parent if path.name == "checkpoints" else path


def kept_side_files(run_dir: Path) -> Path | None:
    """The folder of a run's directory that holds them, if it has one. Without a config.json where
    the run has not started from a Hugging Face directory.
    """
    folder = run_dir / FOLDER
    return folder if folder.is_dir() else None
