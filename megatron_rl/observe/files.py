"""Replacing a file whole, and making room for a new one."""

from __future__ import annotations

import os
from pathlib import Path


def replace_text(path: Path, text: str) -> None:
    """Write a file in one rename: a crash or a full disk leaves the old one or the new one."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def move_aside(path: Path) -> None:
    """Rename a directory, or a file that is not empty, to the first free ``<name>.old-N``."""
    if not path.exists() or path.stat().st_size == 0:
        return
    number = 1
    while path.with_name(f"{path.name}.old-{number}").exists():
        number += 1
    path.rename(path.with_name(f"{path.name}.old-{number}"))
