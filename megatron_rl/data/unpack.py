"""Data files as streams of bytes, unpacked where their names end in .gz or .zst."""

from __future__ import annotations

import contextlib
import gzip
import io
import os
import zlib
from pathlib import Path
from typing import IO, Any, BinaryIO, Iterator

from megatron_rl.errors import UserError

#: Limits of an unpacked file: this many bytes, or this many times its packed size, whichever is
#: more. Text packs to a tenth; a file that packs to a thousandth was made to fill the memory.
MOST_BYTES = 256 << 20
MOST_TIMES = 200


@contextlib.contextmanager
def opened(path: Path, expected: str) -> Iterator[BinaryIO]:
    """A data file for reading.

    Args:
        path: the file.
        expected: the expected file, for messages: "a JSONL file".

    Raises:
        UserError: the file is missing, no regular file (a pipe would be waited for), or needs a
            library that is not installed.
        OSError: it cannot be opened; while reading: it is damaged, or exceeds both `MOST_BYTES` and
            `MOST_TIMES`.
    """
    if not path.exists():
        raise UserError(
            f"data set {path} does not exist; expected {expected}; correct data.train or data.eval"
        )
    if not path.is_file():
        raise UserError(
            f"data set {path} is no regular file; expected {expected}; "
            "correct data.train or data.eval"
        )
    with path.open("rb") as file:
        ending = path.suffix.lower()
        if ending not in (".gz", ".zst"):
            yield file
            return
        most = max(MOST_BYTES, MOST_TIMES * os.fstat(file.fileno()).st_size)
        packed: Any = gzip.GzipFile(fileobj=file) if ending == ".gz" else _zstandard(file, path)
        with contextlib.closing(packed), io.BufferedReader(_Unpacked(packed, most)) as unpacked:
            yield unpacked


def need(library: str, what: str) -> Any:
    """A library of the extra ``data``. UserError: it is not installed."""
    import importlib

    try:
        return importlib.import_module(library)
    except ImportError as error:
        raise UserError(
            f"{what} is read with {library}, which is not installed here ({error}); "
            "pip install 'megatron_rl[data]'"
        ) from error


def _zstandard(file: BinaryIO, path: Path) -> IO[bytes]:
    arrow = need("pyarrow", str(path))
    return arrow.CompressedInputStream(arrow.PythonFile(file), "zstd")


class _Unpacked(io.RawIOBase):
    """A stream that raises OSError if it is damaged or too long."""

    def __init__(self, packed: IO[bytes], most: int) -> None:
        self._packed, self._most, self._read = packed, most, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            data = self._packed.read(len(buffer))
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise OSError(f"damaged: {error}") from error
        self._read += len(data)
        if self._read > self._most:
            raise OSError(
                f"unpacks to more than {self._most:,} bytes, {MOST_TIMES} times its size: unpack "
                "it, and name the file that results, if that is right"
            )
        buffer[: len(data)] = data
        return len(data)
