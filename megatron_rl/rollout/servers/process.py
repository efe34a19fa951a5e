"""Servers of our own: started, watched and stopped by their process group."""

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
from megatron_rl.rollout.servers import leash
from megatron_rl.rollout.servers.api import BadAnswer, Call
from megatron_rl.rollout.servers.exchange import ask_once, shown
from megatron_rl.rollout.servers.keys import KEY_VARIABLE, as_url, listening, new_key

#: Seconds a server has to end by itself before it is killed, and then until it is given up: a
#: process that hangs in a driver cannot be ended.
GRACE_S, KILLED_S = 15.0, 5.0
#: Seconds for a sign of life.
HEALTH_S = 5.0
#: Bytes of a log's end in which its last words are looked for.
_LOG_END = 1 << 16


class ServerProcess:
    """One server on this machine, on a port of its own, with its output in a log file that only
    its owner may read.
    """

    def __init__(self, host: str, log: Path, key: str | None = None) -> None:
        """
        Args:
            host: address of this machine.
            log: file that its output is added to.
            key: without which it answers nobody; None: a new one.
        """
        with listening(host) as free:
            self.port = free.getsockname()[1]
        self.url, self.key = as_url(host, self.port), key or new_key()
        self._log = log
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def is_running(self) -> bool:
        """Whether it was started and has not ended."""
        return self._process is not None and self._process.poll() is None

    @property
    def is_ready(self) -> bool:
        """Whether it answers. Asks it once."""
        if not self.is_running:
            return False
        try:
            ask_once(self.url, Call("/health", None), key=self.key, seconds=HEALTH_S)
        except BadAnswer:
            return False
        return True

    @property
    def pid(self) -> int | None:
        """Its process, if it was started."""
        return self._process.pid if self._process is not None else None

    def start(self, words: Sequence[str], environment: Mapping[str, str]) -> None:
        """Run a command that serves on ``port``, in a process group that ends with this process."""
        self._log.parent.mkdir(parents=True, exist_ok=True)
        with open(self._log, "ab", opener=_owners_alone) as log:
            self._process = subprocess.Popen(
                [sys.executable, leash.__file__, *words],
                env={**os.environ, **environment, KEY_VARIABLE: self.key},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def wait_until_ready(self, seconds: float, stop: Callable[[], bool] = lambda: False) -> None:
        """Wait for its first sign of life.

        Raises:
            RunFailed: it ended, or took longer; with the last line of its log.
            Stopped: ``stop`` said that nobody waits any more.
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
        """End it and all it has started, within 20 s. Does nothing if it has ended."""
        if self._process is None:
            return
        for number, seconds in ((signal.SIGTERM, GRACE_S), (signal.SIGKILL, KILLED_S)):
            with contextlib.suppress(ProcessLookupError):  # SIGKILL: for what it has left behind
                os.killpg(self._process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(seconds)
        self._process = None

    def _last_words(self) -> str:
        try:
            with open(self._log, "rb") as log:
                log.seek(max(0, os.fstat(log.fileno()).st_size - _LOG_END))
                text = log.read(_LOG_END).decode(errors="replace")
        except OSError:
            return "no log"
        told = [line.strip() for line in text.split("\n") if line.strip()]
        errors = [line for line in told if "Error" in line]
        return shown((errors or told or ["nothing in its log"])[-1][-300:])


def _owners_alone(path: str, flags: int) -> int:
    """Opens a file; one that is new is for its owner alone: some servers write what they were
    started with.
    """
    return os.open(path, flags, 0o600)
