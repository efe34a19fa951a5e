"""Writing files whole (a reader, or a run that was killed, sees the old content or the new), and
making room for new ones."""

from __future__ import annotations

import contextlib
import os
import uuid
from pathlib import Path
from typing import Iterator

from megatron_rl.errors import UserError


def write_whole(path: Path, content: str | bytes) -> None:
    """Replace a file, or make it, in one rename, after the content is on the disk.

    The content goes to a new file beside it first, of a name that nobody can have made a link of;
    where ``path`` is a link, the link is replaced and what it points at is left alone.

    Args:
        path: in a directory that exists.
        content: text is written as UTF-8.

    Raises:
        OSError: it cannot be written; ``path`` is as it was, and nothing is left beside it.
    """
    data = content.encode("utf-8") if isinstance(content, str) else content
    beside = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    with open(os.open(beside, flags, 0o666), "wb") as file:
        try:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            os.replace(beside, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(beside)
            raise


def move_aside(path: Path) -> None:
    """Rename a directory, or a file that is not empty, to the first free ``<name>.old-N``."""
    if not path.exists() or path.stat().st_size == 0:
        return
    number = 1
    while path.with_name(f"{path.name}.old-{number}").exists():
        number += 1
    path.rename(path.with_name(f"{path.name}.old-{number}"))


@contextlib.contextmanager
def written_for_the_user(what: str, remedy: str) -> Iterator[None]:
    """In the block an OSError becomes a `UserError`: the machine's reason, and what to do."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{what} could not be written ({reason(error)}); expected room on the disk and the "
            f"right to write there; {remedy}"
        ) from error


def reason(error: OSError) -> str:
    """What the machine said, and of which file, on one line."""
    text = " ".join(str(error.strerror or error).split())
    return f"{text}: {error.filename}" if error.filename else text
