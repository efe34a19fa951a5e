"""Runs that need not import anything: copies of a process that has (`fork_server.py`).

For runs of one process on a CPU. A copy is a process of the study like any other: its exit code,
signals and end are the same, and so are its numbers.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import IO, Any

from megatron_rl.study import with_parent
from megatron_rl.study.fork_server import MESSAGE
from megatron_rl.study.plan import PlannedRun

_PR_SET_CHILD_SUBREAPER = 36
#: Seconds for the imports, and for a copy; many times what they need.
_IMPORT_S = 300.0
_COPY_S = 60.0
#: What a copy stands for, and the process that is copied.
COMMAND = (sys.executable, "-m", "megatron_rl")
SERVER = (sys.executable, "-m", "megatron_rl.study.fork_server")


class ForkedProcess:
    """A copy, with the part of `subprocess.Popen` that a `Child` needs."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._code: int | None = None

    def poll(self) -> int | None:
        """Its exit code, -N after signal N; None while it runs."""
        return self._look(os.WNOHANG)

    def wait(self) -> int:
        """Its exit code, once it has ended."""
        code = self._look(0)
        assert code is not None, "waited for"
        return code

    def send_signal(self, number: int) -> None:
        """Send a signal, if it has not ended."""
        if self.poll() is None:  # until then its number is not given to another
            os.kill(self.pid, number)

    def _look(self, options: int) -> int | None:
        if self._code is None:
            ended, status = os.waitpid(self.pid, options)
            if ended:
                self._code = os.waitstatus_to_exitcode(status)
        return self._code


class ForkServer:
    """The process that is copied. A context manager; it is started with the first run that it is
    for, and refuses with a note where copies are not possible.
    """

    def __init__(
        self,
        note: Callable[[str], None],
        command: Sequence[str] = COMMAND,
        server: Sequence[str] = SERVER,
    ) -> None:
        """
        Args:
            note: shows a line.
            command: how the commands begin that a copy stands for; the rest are its arguments.
            server: the command of the process that is copied, without its descriptor.
        """
        self._note, self._command, self._server = note, list(command), list(server)
        self._connection: socket.socket | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._gpu = False
        self._refused = False

    def __enter__(self) -> ForkServer:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._end()

    def start(
        self, run: PlannedRun, command: Sequence[str], environment: Mapping[str, str], log: IO[Any]
    ) -> ForkedProcess | None:
        """A copy that does what the command would; None: the run needs a process of its own."""
        words = list(command)
        kind = run.config.device.kind
        if self._refused or kind == "cuda" or words[: len(self._command)] != self._command:
            return None
        try:
            if self._process is None:
                self._begin(environment)
            if self._gpu and kind == "auto":
                return None
            return self._ask(words[len(self._command) :], environment, log)
        except (OSError, ValueError, _Refused) as error:  # an answer that is cut is no JSON
            self._refused = True
            self._end()
            self._note(f"each run starts anew and imports for itself: {error or 'no answer'}")
        return None

    def _begin(self, environment: Mapping[str, str]) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._connection = ours
        with theirs:
            number = theirs.fileno()
            command = [*self._server, str(number)]
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", with_parent.__file__, str(os.getpid()), *command],
                env={**environment, "OMP_NUM_THREADS": "1"},  # libraries start none of their own
                pass_fds=[number],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,  # what libraries say while they are imported
                start_new_session=True,
            )
        ours.settimeout(_IMPORT_S)
        found = self._answer()
        if found["refuses"] is not None:
            raise _Refused(found["refuses"])
        self._gpu = found["gpu"]
        ours.settimeout(_COPY_S)

    def _ask(
        self, words: Sequence[str], environment: Mapping[str, str], log: IO[Any]
    ) -> ForkedProcess:
        assert self._connection is not None, "begun"
        about = {"words": words, "environment": dict(environment), "parent": os.getpid()}
        with _orphans_come_here():
            socket.send_fds(self._connection, [json.dumps(about).encode()], [log.fileno()])
            found = self._answer()
        if "error" in found:
            raise _Refused(found["error"])
        return ForkedProcess(found["pid"])

    def _answer(self) -> dict[str, Any]:
        assert self._connection is not None, "begun"
        answer = self._connection.recv(MESSAGE)
        if not answer:
            raise _Refused("the process that had imported for them has ended")
        found: dict[str, Any] = json.loads(answer)
        return found

    def _end(self) -> None:
        """It ends when the connection does."""
        if self._connection is not None:
            self._connection.close()
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(signal.SIGKILL)
            self._process.wait()
        self._connection = self._process = None


class _Refused(Exception):
    """No copy is possible."""


@contextlib.contextmanager
def _orphans_come_here() -> Iterator[None]:
    """While a copy is made this process becomes the parent of descendants whose parent ends."""
    control = ctypes.CDLL(None).prctl
    if control(_PR_SET_CHILD_SUBREAPER, *map(ctypes.c_ulong, (1, 0, 0, 0))) != 0:
        raise OSError("this kernel has no child subreapers")
    try:
        yield
    finally:
        control(_PR_SET_CHILD_SUBREAPER, *map(ctypes.c_ulong, (0, 0, 0, 0)))
