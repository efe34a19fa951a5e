"""Files that grow by whole records, on disks that are sometimes full."""

from __future__ import annotations

import contextlib
import errno
import os
from collections import deque
from collections.abc import Callable
from pathlib import Path

from megatron_rl.files import reason

#: Most bytes of records that wait for room; beyond it the oldest are given up.
MOST_WAITING = 64 * 2**20


class AppendFile:
    """Appends records, so that the file holds whole records at any moment.

    A record that cannot be written is cut off again and waits in memory. The records that wait are
    written, in order, as soon as there is room.
    """

    def __init__(self, path: Path, most_waiting: int = MOST_WAITING) -> None:
        """OSError: the file cannot be opened or made."""
        self.path = path
        self.lost = 0  #: records that were given up
        self._waiting: deque[bytes] = deque()
        self._most_waiting = most_waiting
        self._descriptor = _open(path)
        self._end = os.fstat(self._descriptor).st_size  #: of the last whole record
        self._torn = False  #: a part of a record may follow it

    @property
    def waiting(self) -> int:
        """Records that are not in the file yet."""
        return len(self._waiting)

    def append(self, *records: bytes) -> OSError | None:
        """Add records and write all that wait. Returns the error; None: all are written."""
        self._waiting.extend(records)
        try:
            self._write()
        except OSError as error:
            self._give_up_oldest()
            return error
        return None

    def close(self) -> OSError | None:
        """Try a last time to write, and close. Returns the error; None: all are written."""
        failure = self.append() if self._waiting else None
        try:
            os.close(self._descriptor)
        except OSError as error:  # where NFS says that earlier writes have failed
            failure = failure or error
        return failure

    def reopen(self) -> None:
        """Go on in the file that has replaced the old one. OSError: it cannot be opened."""
        self.close()
        self._descriptor = _open(self.path)
        self._end, self._torn = os.fstat(self._descriptor).st_size, False

    def _write(self) -> None:
        try:
            if self._torn:
                self._cut()
            while self._waiting:
                self._torn = True
                record = memoryview(self._waiting[0])
                while record:  # usually one call: a reader sees whole lines
                    record = record[os.write(self._descriptor, record) :]
                self._end += len(self._waiting.popleft())
                self._torn = False
        except OSError as error:
            with contextlib.suppress(OSError):  # else it is cut before the next record
                if error.errno == errno.ESTALE:  # the server of the disk was started again
                    stale, self._descriptor = self._descriptor, _open(self.path)
                    os.close(stale)
                if self._torn:
                    self._cut()
            raise

    def _cut(self) -> None:
        os.ftruncate(self._descriptor, self._end)
        self._torn = False

    def _give_up_oldest(self) -> None:
        size = sum(map(len, self._waiting))
        while size > self._most_waiting:
            size -= len(self._waiting.popleft())
            self.lost += 1


class WarningFile(AppendFile):
    """An `AppendFile` that warns once when writing fails, and once when it works again."""

    def __init__(self, path: Path, warn: Callable[[str], None]) -> None:
        """OSError: the file cannot be opened or made."""
        super().__init__(path)
        self._warn, self._failing = warn, False

    def write(self, *records: bytes) -> None:
        """`append` the records."""
        self.note(self.append(*records))

    def note(self, failure: OSError | None) -> None:
        """Warn once of a failure, and once when writing works again (None)."""
        if failure is not None and not self._failing:
            self._warn(
                f"{self.path} could not be written ({reason(failure)}); what is missing is kept "
                "in memory and written when there is room; make room"
            )
        elif failure is None and self._failing:
            lost = f", {self.lost} old records are lost" if self.lost else ""
            self._warn(f"{self.path} is written again{lost}")
        self._failing = failure is not None

    def finish(self) -> None:
        """Write what still waits, if there is room, close, and warn of what is lost."""
        failure = self.close()
        lost = self.waiting + self.lost
        if lost:
            records = f"{lost} record{'' if lost == 1 else 's'}"
            self._warn(f"{records} of {self.path} could not be written and are lost")
        elif failure is not None:
            self._warn(f"{self.path} may lack its last records ({reason(failure)})")


def _open(path: Path) -> int:
    # Not blocking: with a pipe in its place, open would wait for a reader.
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK
    return os.open(path, flags, 0o666)
