"""The only place that runs model output: a Python program and its tests in a confined process.

What holds, on Linux for x86-64 and ARM64, with or without root rights:

* a system-call filter (seccomp) from before the program's first statement: no sockets, hence no
  network; no new process or thread, no exec; no signal to and no look into other processes; files
  can be read but nothing can be created, changed or removed;
* limits on CPU time, address space, open files, file size and core dumps; deadlines after which the
  whole process group is killed; the process also dies with the one that started it;
* an empty environment, an empty working directory, isolated mode (-I) without site packages: only
  the standard library;
* output is thrown away, so it cannot fill memory or disk and cannot be taken for a verdict.

What does not hold: the program can read every file its user can read; and since the tests run in
the same interpreter, a program written to forge the verdict could search its own process for the
channel and the token and do so. Leaving early, printing, or raising in any way never counts as a
pass.

How busy the machine is decides no verdict: processor time does, and time asleep; elapsed time ends
only what is stuck. A child that something else has killed (the machine was out of memory) is run
once more.
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
from typing import IO, Sequence

from megatron_rl.errors import UserError

_CHILD = Path(__file__).with_name("sandbox_child.py")
_MAX_VERDICT_BYTES = 8192
_START_S = 300.0  # for the interpreter to start and confine itself, from a busy disk
_MAX_REASON = 300
_TICK_S = 0.1  # how often the child's time is looked at


@dataclass(frozen=True)
class Limits:
    """What a program may use."""

    cpu_s: int = 4  #: processor time, seconds
    #: elapsed time from the program's first statement on, less the time in which it was ready to
    #: run and other processes had the cores, seconds
    wall_s: float = 8.0
    stop_s: float = 120.0  #: the same with that time, seconds: for a machine that is stuck
    memory_mib: int = 512  #: address space, MiB


@dataclass(frozen=True)
class Outcome:
    """What became of a program."""

    passed: bool  #: every test ran to its end
    compiled: bool  #: the program is valid Python
    reason: str


def run_program(
    program: str | Sequence[str], tests: str, entry_point: str, limits: Limits
) -> Outcome:
    """Executes the program, then its tests; if these define ``check``, calls it on the entry point.

    Several programs are the ways to read one answer: the first that compiles is executed. The entry
    point is a function "f", or the method f of a class Solution, or of a class C as "C().f".
    Passed: all of that returned. Raises ``UserError`` where the confinement cannot be set up.
    """
    if not sys.platform.startswith("linux"):
        raise UserError(
            f"platform {sys.platform}; the code sandbox expects Linux; "
            "run the verifier 'code' on Linux"
        )
    programs = [program] if isinstance(program, str) else list(program)
    job = json.dumps([programs, tests, entry_point]).encode()
    outcome = _run_once(job, limits)
    if outcome is None:
        outcome = _run_once(job, limits)
    return outcome or Outcome(False, False, "killed from outside, twice")


def _run_once(job: bytes, limits: Limits) -> Outcome | None:
    """None: something else has killed the child."""
    token = secrets.token_hex(16)
    # The child takes the token from its pipe after the last test; no variable holds it before.
    token_read, token_write = os.pipe()
    verdict_read, verdict_write = os.pipe()
    try:
        os.write(token_write, token.encode())
        with (
            tempfile.TemporaryFile() as file,
            tempfile.TemporaryDirectory(prefix="sandbox-") as folder,
        ):
            file.write(job)
            file.seek(0)
            child = _start(file, folder, token_read, verdict_write, limits)
            os.close(verdict_write)
            verdict_write = -1
            try:
                own = _OwnTime(child.pid)
                lines, stopped = _read_lines(verdict_read, own, limits)
                killed = not stopped and _ended_by(child) == -signal.SIGKILL
            finally:
                _kill(child)
    finally:
        for descriptor in (token_read, token_write, verdict_read, verdict_write):
            if descriptor >= 0:
                os.close(descriptor)
    # With its processor time used up, it is the kernel that kills a program that ignores SIGXCPU.
    decided = own.cpu_s >= limits.cpu_s or lines[-1:] and lines[-1].startswith(("passed", "failed"))
    if killed and not decided:
        return None
    return _judge(lines, stopped, child.returncode, token, limits)


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


class _OwnTime:
    """Seconds a process has computed or slept: what it cannot blame on a busy machine."""

    def __init__(self, pid: int) -> None:
        self._stat = Path(f"/proc/{pid}/stat")
        self._start = self._cpu_s = 0.0
        self._asleep_s = 0.0
        self._looked = time.monotonic()

    def begin(self) -> None:
        """Count from here on."""
        self._start = self._cpu_s = self._read()[1]
        self._asleep_s, self._looked = 0.0, time.monotonic()

    def look(self) -> float:
        """Seconds so far. To be called about once a tick: the process is seen in its sleep."""
        state, cpu_s = self._read()
        now = time.monotonic()
        if state == "S":
            # Not more than two ticks at a time: this thread may have been held up itself.
            elapsed = min(now - self._looked, 2 * _TICK_S)
            self._asleep_s += max(0.0, elapsed - (cpu_s - self._cpu_s))
        self._cpu_s, self._looked = cpu_s, now
        return self._cpu_s - self._start + self._asleep_s

    @property
    def cpu_s(self) -> float:
        """Processor time when it was looked at last, seconds."""
        return self._cpu_s

    def _read(self) -> tuple[str, float]:
        """State, as in proc(5), and processor time, seconds."""
        try:
            # The name of the command stands in parentheses and may hold any character.
            fields = self._stat.read_text().rpartition(")")[2].split()
        except OSError:  # it has ended; its pipe says so
            return "", self._cpu_s
        return fields[0], (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _read_lines(descriptor: int, own: _OwnTime, limits: Limits) -> tuple[list[str], str]:
    """Lines up to the end of the pipe, a deadline or ``_MAX_VERDICT_BYTES``; why it was stopped.

    The first line ends the start of the interpreter, which has a deadline of its own.
    """
    poll = select.poll()  # not select(): a training process may have more than 1024 descriptors
    poll.register(descriptor, select.POLLIN)
    data = b""
    deadline = time.monotonic() + _START_S
    while len(data) < _MAX_VERDICT_BYTES:
        if time.monotonic() >= deadline:
            return _lines(data), f"stopped after {limits.stop_s:g} s, kept from running"
        if b"\n" in data and own.look() >= limits.wall_s:
            return _lines(data), f"stopped after {limits.wall_s:g} s"
        if not poll.poll(1000 * _TICK_S):
            continue
        chunk = os.read(descriptor, _MAX_VERDICT_BYTES)
        if not chunk:
            break
        if b"\n" not in data and b"\n" in chunk:
            deadline = time.monotonic() + limits.stop_s
            own.begin()
        data += chunk
    return _lines(data), ""


def _lines(data: bytes) -> list[str]:
    return data.decode("utf-8", errors="replace").split("\n")[:-1]


def _ended_by(child: subprocess.Popen) -> int | None:
    """The exit code of a child that closed its pipe; None if it goes on without one."""
    try:
        return child.wait(1.0)
    except subprocess.TimeoutExpired:
        return None


def _kill(child: subprocess.Popen) -> None:
    try:
        # The child leads its session, so its id is the group's.
        os.killpg(child.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass  # it had ended and been reaped
    child.wait()


def _judge(lines: list[str], stopped: str, exit_code: int, token: str, limits: Limits) -> Outcome:
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
    if stopped:
        return Outcome(False, compiled, stopped)
    if exit_code == -signal.SIGXCPU:
        return Outcome(False, compiled, f"stopped after {limits.cpu_s} s of processor time")
    return Outcome(False, compiled, "ended before its tests were done")
