"""Reads files with bounds, writes them whole (a reader, or a killed run, leaves the old content or
the new), and moves old ones aside.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import uuid
from pathlib import Path
from typing import Iterator

from megatron_rl.errors import UserError


def read_bounded(path: Path, most_bytes: int) -> bytes:
    """The content of a file that others may have written.

    Raises:
        OSError: the file is unreadable, no regular file (a pipe would be waited for, a device read
            without end), or larger than ``most_bytes``.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        status = os.fstat(descriptor)
        if stat.S_ISDIR(status.st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "not a regular file")
        with open(descriptor, "rb", closefd=False) as file:
            content = b"" if status.st_size > most_bytes else file.read(most_bytes + 1)
    finally:
        os.close(descriptor)
    if max(status.st_size, len(content)) > most_bytes:
        size = max(status.st_size, len(content))
        raise OSError(errno.EFBIG, f"{size:,} bytes, more than {most_bytes:,}")
    return content


def write_whole(path: Path, content: str | bytes) -> None:
    """Create or replace a file in one rename, after its content is on the disk.

    The content first goes to a new file beside it, with a random name, so that nobody can have
    placed a link there. If ``path`` is a link, the link is replaced and its target is left alone.

    Args:
        path: its directory must exist.
        content: text is written as UTF-8.

    Raises:
        OSError: the file cannot be written; ``path`` is unchanged, and nothing is left beside it.
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
    """A context in which an OSError becomes a `UserError` with the machine's reason and a
    remedy.
    """
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{what} could not be written ({reason(error)}); expected room on the disk and the "
            f"right to write there; {remedy}"
        ) from error


def reason(error: OSError) -> str:
    """The machine's reason and the file, on one line."""
    text = " ".join(str(error.strerror or error).split())
    return f"{text}: {error.filename}" if error.filename else text
