"""Worker processes that answer one line with one line, as many in parallel as there are requests.

A worker computes on a model's answers, which can take for ever. Its limit is processor time, so
that a busy machine changes no reward. The worker stops itself (``math_worker.py``); the deadline in
elapsed time here is for a worker that does not.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from megatron_rl.errors import UserError
from megatron_rl.rewards.base import started

#: Seconds for a worker to start: it may import from a busy disk.
_START_S = 300.0


class WorkerPool:
    """Workers of one script. A free worker is reused; if none is free, a new one starts.

    Workers end with the process that uses them. Safe to use from several threads.
    """

    def __init__(self, script: Path, cpu_s: float, wall_s: float, remedy: str) -> None:
        """
        Args:
            script: run as ``script CPU_S``; writes "ready" (or what it lacks), then for each line
                it reads one line: a verdict, "late" after ``cpu_s``, or "killed".
            cpu_s: processor time an answer may take, seconds.
            wall_s: elapsed time after which a worker is given up, seconds; for stuck machines only.
            remedy: "expected; remedy" for a worker that lacks something.
        """
        self._script, self._cpu_s, self._wall_s, self._remedy = script, cpu_s, wall_s, remedy
        self._lock = threading.Lock()
        self._free: list[subprocess.Popen[bytes]] = []
        self._owner = os.getpid()

    def ask(self, line: str) -> str:
        """The reply of a worker: a verdict, "late" or "killed".

        If something else killed a worker (the machine was out of memory), that is no verdict: the
        line is sent again. Raises ``UserError`` if a worker cannot start, ``RunFailed`` if the
        machine has no room for one.
        """
        reply = self._ask_once(line)
        return self._ask_once(line) if reply == "killed" else reply

    def _ask_once(self, line: str) -> str:
        worker, reply = self._take(), ""
        try:
            reply = _exchange(worker, line, self._wall_s)
        finally:
            alive = worker.poll() is None
            # "killed" may come from an earlier line, with this line's answer still to come.
            if alive and reply not in ("", "killed"):
                with self._lock:
                    self._free.append(worker)
            else:
                _end(worker)
        return reply or ("late" if alive else "killed")

    def _take(self) -> subprocess.Popen[bytes]:
        with self._lock:
            if self._owner != os.getpid():  # a forked copy must not share its parent's pipes
                self._free, self._owner = [], os.getpid()
            free = self._free.pop() if self._free else None
        if free is not None and free.poll() is None:
            return free
        if free is not None:
            _end(free)
        return self._start()

    def _start(self) -> subprocess.Popen[bytes]:
        # Run as a script, it would import the math.py beside it, not the standard library's.
        code = f"import runpy; runpy.run_path({str(self._script)!r}, run_name='__main__')"
        with started(self._script.stem):
            worker = subprocess.Popen(
                [sys.executable, "-c", code, str(self._cpu_s)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
        ready = _read_line(worker, time.monotonic() + _START_S)
        if ready != "ready":
            _end(worker)
            raise UserError(f"{self._script.stem}: {ready or 'no reply'}; {self._remedy}")
        return worker


def _exchange(worker: subprocess.Popen[bytes], line: str, seconds: float) -> str:
    """Send a line and return the reply; "" if the worker died or was too late."""
    assert worker.stdin is not None, "a pipe"
    try:
        worker.stdin.write(line.encode() + b"\n")
        worker.stdin.flush()
    except BrokenPipeError:
        return ""
    return _read_line(worker, time.monotonic() + seconds)


def _read_line(worker: subprocess.Popen[bytes], deadline: float) -> str:
    assert worker.stdout is not None, "a pipe"
    poll = select.poll()
    poll.register(worker.stdout, select.POLLIN)
    data = b""
    while not data.endswith(b"\n"):
        remaining = deadline - time.monotonic()
        if remaining <= 0 or not poll.poll(1000 * remaining):
            return ""
        chunk = os.read(worker.stdout.fileno(), 4096)
        if not chunk:
            worker.wait()
            return ""
        data += chunk
    return data.decode().strip()


def _end(worker: subprocess.Popen[bytes]) -> None:
    """Kill the worker and its children: it leads its session, so its id is the group's."""
    try:
        os.killpg(worker.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass  # it had ended and been reaped
    worker.wait()
    assert worker.stdin is not None and worker.stdout is not None, "pipes"
    worker.stdin.close()
    worker.stdout.close()
