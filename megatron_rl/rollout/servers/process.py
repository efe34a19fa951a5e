"""Servers of our own: started, watched and stopped by their process group."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Callable, Mapping, Sequence

import httpx

from megatron_rl.errors import RunFailed, Stopped
from megatron_rl.rollout.servers import leash

#: Seconds a server has to end by itself before it is killed.
GRACE_S = 15.0


class ServerProcess:
    """One server on this machine, on a port of its own, with its output in a log file."""

    def __init__(self, host: str, log: Path) -> None:
        self.port = _free_port(host)
        self.url = f"http://{host}:{self.port}"
        self._log = log
        self._process: subprocess.Popen | None = None

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
            return httpx.get(f"{self.url}/health", timeout=5.0, trust_env=False).is_success
        except httpx.HTTPError:
            return False

    @property
    def pid(self) -> int | None:
        """Its process, if it was started."""
        return self._process.pid if self._process is not None else None

    def start(self, words: Sequence[str], environment: Mapping[str, str]) -> None:
        """Run a command that serves on ``port``, in a process group that ends with this process."""
        self._log.parent.mkdir(parents=True, exist_ok=True)
        with open(self._log, "ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, leash.__file__, *words],
                env={**os.environ, **environment},
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
        """End it and all it has started. Does nothing if it has ended."""
        if self._process is None:
            return
        for number, seconds in ((signal.SIGTERM, GRACE_S), (signal.SIGKILL, None)):
            try:
                os.killpg(self._process.pid, number)
            except ProcessLookupError:
                break
            try:
                self._process.wait(seconds)
            except subprocess.TimeoutExpired:
                continue
        self._process.wait()
        self._process = None

    def _last_words(self) -> str:
        try:
            lines = self._log.read_text(encoding="utf-8", errors="replace").split("\n")
        except OSError:
            return "no log"
        told = [line.strip() for line in lines if line.strip()]
        errors = [line for line in told if "Error" in line]
        return (errors or told or ["nothing in its log"])[-1][-300:]


def _free_port(host: str) -> int:
    with socket.socket() as free:
        free.bind((host, 0))
        return free.getsockname()[1]
