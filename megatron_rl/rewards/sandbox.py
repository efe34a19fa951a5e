"""The only place that runs model output: a Python program and its tests in a confined process.

What holds, on Linux for x86-64 and ARM64, with or without root rights:

* a system-call filter (seccomp) from before the program's first statement: no sockets, hence no
  network; no new process or thread, no exec; no signal to and no look into other processes; files
  can be read but nothing can be created, changed or removed;
* limits on CPU time, address space, open files, file size and core dumps; a wall-clock deadline,
  after which the whole process group is killed; the process also dies with the one that started it;
* an empty environment, an empty working directory, isolated mode (-I) without site packages: only
  the standard library;
* output is thrown away, so it cannot fill memory or disk and cannot be taken for a verdict.

What does not hold: the program can read every file its user can read; and since the tests run in
the same interpreter, a program written to forge the verdict could search its own process for the
channel and the token and do so. Leaving early, printing, or raising in any way never counts as a
pass.
"""

from __future__ import annotations

import json
import os
import resource
import secrets
import select
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from megatron_rl.errors import UserError

_CHILD = Path(__file__).with_name("sandbox_child.py")
_MAX_VERDICT_BYTES = 8192
_START_S = 60.0  # for the interpreter to start and confine itself
_MAX_REASON = 300


@dataclass(frozen=True)
class Limits:
    """What a program may use."""

    cpu_s: int = 4  #: processor time, seconds
    wall_s: float = 8.0  #: elapsed time from the program's first statement on, seconds
    memory_mib: int = 512  #: address space, MiB


@dataclass(frozen=True)
class Outcome:
    """What became of a program."""

    passed: bool  #: every test ran to its end
    compiled: bool  #: the program is valid Python
    reason: str


def run_program(program: str, tests: str, entry_point: str, limits: Limits) -> Outcome:
    """Executes the program, then its tests; if these define ``check``, calls it on the entry point.

    Passed: all of that returned. Raises ``UserError`` where the confinement cannot be set up.
    """
    if not sys.platform.startswith("linux"):
        raise UserError(
            f"platform {sys.platform}; the code sandbox expects Linux; "
            "run the verifier 'code' on Linux"
        )
    token = secrets.token_hex(16)
    # The child takes the token from its pipe after the last test; no variable holds it before.
    token_read, token_write = os.pipe()
    verdict_read, verdict_write = os.pipe()
    try:
        os.write(token_write, token.encode())
        with (
            tempfile.TemporaryFile() as job,
            tempfile.TemporaryDirectory(prefix="sandbox-") as folder,
        ):
            job.write(json.dumps([program, tests, entry_point]).encode())
            job.seek(0)
            child = _start(job, folder, token_read, verdict_write, limits)
            os.close(verdict_write)
            verdict_write = -1
            try:
                lines, ended = _read_lines(verdict_read, limits.wall_s)
            finally:
                _kill(child)
    finally:
        for descriptor in (token_read, token_write, verdict_read, verdict_write):
            if descriptor >= 0:
                os.close(descriptor)
    return _judge(lines, ended, child.returncode, token, limits)


def check_limits(limits: Limits) -> None:
    """``UserError`` where the limits of this process (ulimit) leave a program less than that."""
    allowed = (
        ("-t", resource.RLIMIT_CPU, limits.cpu_s + 1, "s of processor time"),
        ("-v", resource.RLIMIT_AS, limits.memory_mib * 2**20, "bytes of address space"),
    )
    for flag, limit, wanted, what in allowed:
        hard = resource.getrlimit(limit)[1]
        if hard != resource.RLIM_INFINITY and hard < wanted:
            raise UserError(
                f"`ulimit {flag}` leaves {hard:,} {what}; the verifier 'code' expects at least "
                f"{wanted:,} for each program; raise it, or set reward.name to another verifier"
            )


def _start(
    job: IO[bytes], folder: str, token_read: int, verdict_write: int, limits: Limits
) -> subprocess.Popen:
    settings = [
        str(token_read),
        str(verdict_write),
        str(limits.cpu_s),
        str(limits.memory_mib),
        str(os.getpid()),
    ]
    return subprocess.Popen(
        [sys.executable, "-I", "-S", "-B", str(_CHILD), *settings],
        stdin=job,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd=folder,
        env={},
        pass_fds=(token_read, verdict_write),
        start_new_session=True,
    )


def _read_lines(descriptor: int, wall_s: float) -> tuple[list[str], bool]:
    """Lines up to the end of the pipe, the deadline or ``_MAX_VERDICT_BYTES``; False: the deadline.

    The first line ends the start of the interpreter, which has a deadline of its own: how busy the
    machine is at that moment must not decide about a reward.
    """
    poll = select.poll()  # not select(): a training process may have more than 1024 descriptors
    poll.register(descriptor, select.POLLIN)
    data = b""
    deadline = time.monotonic() + _START_S
    while len(data) < _MAX_VERDICT_BYTES:
        remaining = deadline - time.monotonic()
        if remaining <= 0 or not poll.poll(1000 * remaining):
            return _lines(data), False
        chunk = os.read(descriptor, _MAX_VERDICT_BYTES)
        if not chunk:
            break
        if b"\n" not in data and b"\n" in chunk:
            deadline = time.monotonic() + wall_s
        data += chunk
    return _lines(data), True


def _lines(data: bytes) -> list[str]:
    return data.decode("utf-8", errors="replace").split("\n")[:-1]


def _kill(child: subprocess.Popen) -> None:
    try:
        # The child leads its session, so its id is the group's.
        os.killpg(child.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass  # it had ended and been reaped
    child.wait()


def _judge(lines: list[str], ended: bool, exit_code: int, token: str, limits: Limits) -> Outcome:
    if not lines or lines[0] != "ready":
        # Only the part of the child that precedes the program can have written the first line.
        found = lines[0] if lines else f"no word from the child (exit code {exit_code})"
        raise UserError(
            f"code sandbox not available: {found[:_MAX_REASON]}; "
            "expected Linux with seccomp on x86-64 or ARM64; "
            "run on such a machine or set reward.name to another verifier"
        )
    compiled = "compiled" in lines[1:2]
    last = lines[-1]
    if last == f"passed {token}":
        return Outcome(True, True, "all tests passed")
    if last.startswith("failed "):
        return Outcome(False, compiled, last[len("failed ") :][:_MAX_REASON])
    if not ended:
        return Outcome(False, compiled, f"stopped after {limits.wall_s:g} s")
    if exit_code == -signal.SIGXCPU:
        return Outcome(False, compiled, f"stopped after {limits.cpu_s} s of processor time")
    return Outcome(False, compiled, "ended before its tests were done")
