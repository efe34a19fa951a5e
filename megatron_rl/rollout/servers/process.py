"""One server of a run's own: a process that is started, watched and ended."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Callable, Mapping, Sequence

from megatron_rl.errors import RunFailed, Stopped
from megatron_rl.rollout.servers import supervisor
from megatron_rl.rollout.servers.addresses import as_url, listening
from megatron_rl.rollout.servers.api import BadAnswer, Call
from megatron_rl.rollout.servers.exchange import ask_once, short_line
from megatron_rl.rollout.servers.keys import KEY_VARIABLE, new_key

#: Seconds to end by itself, and then to die of a kill. After both the process is given up: one that
#: hangs in a driver cannot be ended.
GRACE_S, KILLED_S = 15.0, 5.0
#: Deadline of a health check, seconds.
HEALTH_S = 5.0
#: Bytes at the end of a log in which an error message is looked for.
_LOG_END = 1 << 16


class ServerProcess:
    """A server on this machine, on a port of its own. Only the file's owner may read its log."""

    def __init__(self, host: str, log: Path, key: str | None = None) -> None:
        """
        Args:
            host: the address of this machine at which it listens.
            log: the file that its output is appended to.
            key: what a request must carry; None: a new key.
        """
        with listening(host) as free:
            self.host, self.port = host, free.getsockname()[1]
        self.url, self.key = as_url(host, self.port), key or new_key()
        self._log = log
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def is_running(self) -> bool:
        """Whether the process is there."""
        return self._process is not None and self._process.poll() is None

    @property
    def is_ready(self) -> bool:
        """Whether it answers a health check."""
        if not self.is_running:
            return False
        try:
            ask_once(self.url, Call("/health", None), key=self.key, seconds=HEALTH_S)
        except BadAnswer:
            return False
        return True

    @property
    def pid(self) -> int | None:
        """Process id of its supervisor; None: it was not started, or was stopped."""
        return self._process.pid if self._process is not None else None

    def start(self, argv: Sequence[str], environment: Mapping[str, str]) -> None:
        """Run a command that serves on ``port``, in a process group that ends with this process.

        Args:
            argv: the command.
            environment: variables beyond those of this process.
        """
        self._log.parent.mkdir(parents=True, exist_ok=True)
        with open(self._log, "ab", opener=_open_private) as log:
            self._process = subprocess.Popen(
                [sys.executable, supervisor.__file__, *argv],
                env={**os.environ, **environment, KEY_VARIABLE: self.key},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def wait_until_ready(self, seconds: float, stop: Callable[[], bool] = lambda: False) -> None:
        """Wait until it answers a health check.

        Raises:
            RunFailed: it ended, or did not answer in time; with an error from its log.
            Stopped: ``stop`` returned True.
        """
        end = time.monotonic() + seconds
        while self.is_running and time.monotonic() < end:
            if self.is_ready:
                return
            if stop():
                raise Stopped
            time.sleep(0.3)
        state = "gave no sign of life" if self.is_running else "ended"
        self.stop()
        raise RunFailed(
            f"the rollout server at {self.url} {state} within {seconds:g} s "
            f"({self._last_words()}); see {self._log}"
        )

    def stop(self) -> None:
        """End it and all processes that it started, within 20 s."""
        if self._process is None:
            return
        for number, seconds in ((signal.SIGTERM, GRACE_S), (signal.SIGKILL, KILLED_S)):
            with contextlib.suppress(ProcessLookupError):  # SIGKILL also ends what it left behind
                os.killpg(self._process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(seconds)
        self._process = None

    def _last_words(self) -> str:
        """The last line of its log with an error, or the last line."""
        try:
            with open(self._log, "rb") as log:
                log.seek(max(0, os.fstat(log.fileno()).st_size - _LOG_END))
                text = log.read(_LOG_END).decode(errors="replace")
        except OSError:
            return "no log"
        told = [line.strip() for line in text.split("\n") if line.strip()]
        errors = [line for line in told if "Error" in line]
        return short_line((errors or told or ["nothing in its log"])[-1][-300:])


def _open_private(path: str, flags: int) -> int:
    """Open a file, and create it for its owner alone: some servers log their arguments, with the
    key.
    """
    return os.open(path, flags, 0o600)
