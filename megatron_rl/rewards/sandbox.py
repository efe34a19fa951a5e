"""The only place that runs model output: a confined process, judged by another one.

The judge runs the tests and calls the program through a pipe for plain values; this folder's README
describes each boundary. It needs Linux on x86-64 or ARM64, with or without root rights.

Limits count processor time and time asleep, so a busy machine changes no verdict; the limit of
elapsed time is for stuck machines. If something else killed a process (the machine was out of
memory), that is no verdict: the program is run again.
"""

from __future__ import annotations

import json
import os
import resource
import select
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import IO, Any, Sequence

from megatron_rl.errors import UserError

_START = Path(__file__).with_name("sandbox_start.py")
_MAX_VERDICT_BYTES = 8192
_START_S = 300.0  # for the interpreter to start and confine itself, from a busy disk
_MAX_REASON = 300
_TICK_S = 0.1  # how often the child's time is looked at


@dataclass(frozen=True)
class Limits:
    """Limits of a program."""

    cpu_s: int = 4  #: processor time, seconds
    #: elapsed time since the program's first statement, without time in which it was ready to run
    #: but other processes had the cores, seconds
    wall_s: float = 8.0
    stop_s: float = 120.0  #: the same including that time, seconds: for stuck machines
    memory_mib: int = 512  #: address space, MiB


@dataclass(frozen=True)
class Outcome:
    """The outcome of a program."""

    passed: bool  #: every test ran to its end
    compiled: bool  #: the program is valid Python
    reason: str
    #: what confined it, and what this machine lacks; not part of the verdict
    held: str = field(default="", compare=False)


@dataclass(frozen=True)
class Job:
    """A program and its tests.

    Several programs are several readings of one answer: the first that compiles is executed. The
    entry point is a function "f", or the method f of a class Solution, or of a class C as "C().f";
    it is empty for a program that reads its input and prints.
    """

    programs: Sequence[str]
    entry_point: str
    tests: str = ""  #: source; if it defines ``check``, ``check`` is called with the entry point
    #: in place of tests: [input text, output text], or [list of arguments, result]
    cases: Sequence[tuple[Any, Any]] = ()
    prompt: str = ""  #: source whose definitions the tests may use


def run_program(job: Job, limits: Limits) -> Outcome:
    """Execute the program and its tests in separate processes. Passed: all tests returned.

    Raises ``UserError`` if the confinement cannot be set up.
    """
    if not sys.platform.startswith("linux"):
        raise UserError(
            f"platform {sys.platform}; the code sandbox expects Linux; "
            "run the verifier 'code' on Linux"
        )
    data = json.dumps(asdict(job)).encode()
    kind = "call" if job.entry_point else "run"
    outcome = _run_once(data, kind, limits)
    if outcome is None:
        outcome = _run_once(data, kind, limits)
    return outcome or Outcome(False, False, "killed from outside, twice")


def _run_once(job: bytes, kind: str, limits: Limits) -> Outcome | None:
    """One attempt. None: something else killed the program or its judge."""
    verdict_read, verdict_write = os.pipe()
    try:
        with (
            tempfile.TemporaryFile() as file,
            tempfile.TemporaryDirectory(prefix="sandbox-") as folder,
        ):
            file.write(job)
            file.seek(0)
            judge = _start(file, folder, verdict_write, kind, limits)
            os.close(verdict_write)
            verdict_write = -1
            try:
                own = _OwnTime(judge.pid)
                lines, stopped = _read_lines(verdict_read, own, limits)
                killed = not stopped and _ended_by(judge) == -signal.SIGKILL
            finally:
                _kill(judge)
    finally:
        for descriptor in (verdict_read, verdict_write):
            if descriptor >= 0:
                os.close(descriptor)
    if lines[-1:] == ["killed"] or killed and own.judge_cpu_s < limits.cpu_s:
        return None
    outcome = _judge(lines, stopped, judge.returncode, limits)
    return replace(outcome, held=lines[0].split(" ", 2)[2])


def check_limits(limits: Limits) -> None:
    """Raise ``UserError`` if the limits of this process (ulimit) leave a program less than it
    needs.
    """
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


def check_confinement() -> str:
    """What confines programs on this machine, as text. Raises ``UserError`` if a program can open
    this file or this process's own files.
    """
    program = (
        "def f(path):\n    try:\n        open(path, 'rb').close()\n"
        "    except OSError:\n        return 'closed'\n    return 'open'\n"
    )
    places = (__file__, f"/proc/{os.getpid()}/environ", f"/proc/{os.getpid()}/mem")
    for_all = f"assert [f(place) for place in {places!r}] == ['closed'] * {len(places)}"
    outcome = run_program(Job([program], "f", for_all), Limits())
    if not outcome.passed:
        raise UserError(
            f"code sandbox that can read this process's files ({outcome.reason}); expected none "
            "but the standard library's; set reward.name to another verifier"
        )
    return outcome.held


def _start(
    job: IO[bytes], folder: str, verdict: int, kind: str, limits: Limits
) -> subprocess.Popen[bytes]:
    settings = map(str, (verdict, limits.cpu_s, limits.memory_mib, os.getpid(), kind))
    return subprocess.Popen(
        [sys.executable, "-I", "-S", str(_START), *settings],
        stdin=job,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd=folder,
        env={},
        pass_fds=(verdict,),
        start_new_session=True,
    )


class _OwnTime:
    """Seconds in which a program and its judge computed or slept; a busy machine does not add to
    them.
    """

    def __init__(self, judge: int) -> None:
        self._pids = [judge]
        self._cpu_s = [0.0]
        self._start = self._asleep_s = 0.0
        self._looked = time.monotonic()

    def begin(self, program: int) -> None:
        """Start to count, now for the program as well."""
        self._pids.append(program)
        self._cpu_s.append(0.0)
        self._read()
        self._start = sum(self._cpu_s)
        self._asleep_s, self._looked = 0.0, time.monotonic()

    def look(self) -> float:
        """Seconds so far. Call it about once a tick, since it samples whether the processes
        sleep.
        """
        before = sum(self._cpu_s)
        states = self._read()
        now, computed = time.monotonic(), sum(self._cpu_s)
        if states <= {"S", ""}:  # the judge sleeps while the program computes, so both must sleep
            # At most two ticks at a time: this thread may have been delayed itself.
            elapsed = min(now - self._looked, 2 * _TICK_S)
            self._asleep_s += max(0.0, elapsed - (computed - before))
        self._looked = now
        return computed - self._start + self._asleep_s

    @property
    def judge_cpu_s(self) -> float:
        """Processor time of the judge at the last look, seconds."""
        return self._cpu_s[0]

    def _read(self) -> set[str]:
        """The processes' states, as in proc(5). Records processor times, seconds."""
        states = set()
        for place, pid in enumerate(self._pids):
            try:
                # The command name is in parentheses and may contain any character.
                stat = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            except OSError:  # it has ended, which its pipe shows
                states.add("")
                continue
            states.add(stat[0])
            self._cpu_s[place] = (int(stat[11]) + int(stat[12])) / os.sysconf("SC_CLK_TCK")
        return states


def _read_lines(descriptor: int, own: _OwnTime, limits: Limits) -> tuple[list[str], str]:
    """Read lines up to the end of the pipe, a deadline or ``_MAX_VERDICT_BYTES``; returns also why
    it was stopped.

    The first line ends the interpreter's start, which has its own deadline.
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
            first = (data + chunk).split()
            if first[0] == b"ready":
                own.begin(int(first[1]))
        data += chunk
    return _lines(data), ""


def _lines(data: bytes) -> list[str]:
    return data.decode("utf-8", errors="replace").split("\n")[:-1]


def _ended_by(judge: subprocess.Popen[bytes]) -> int | None:
    """The exit code of a judge that closed its pipe; None if it still runs."""
    try:
        return judge.wait(1.0)
    except subprocess.TimeoutExpired:
        return None


def _kill(judge: subprocess.Popen[bytes]) -> None:
    # A terminated judge reaps the program; the first process of a container may not.
    judge.terminate()
    if _ended_by(judge) is not None:
        return
    try:
        # The judge leads its session, so its id is the group's.
        os.killpg(judge.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass  # it had ended
    judge.wait()


def _judge(lines: list[str], stopped: str, exit_code: int, limits: Limits) -> Outcome:
    if not lines or not lines[0].startswith("ready "):
        found = lines[0] if lines else f"no result from the judge (exit code {exit_code})"
        raise UserError(
            f"code sandbox not available: {found[:_MAX_REASON]}; "
            "expected Linux with seccomp on x86-64 or ARM64; "
            "run on such a machine or set reward.name to another verifier"
        )
    compiled = "compiled" in lines[1:2]
    last = lines[-1]
    if last == "passed":
        return Outcome(True, True, "all tests passed")
    if last.startswith("failed "):
        return Outcome(False, compiled, last[len("failed ") :][:_MAX_REASON])
    if stopped:
        return Outcome(False, compiled, stopped)
    if exit_code == -signal.SIGXCPU:
        return Outcome(False, compiled, f"stopped after {limits.cpu_s} s of processor time")
    return Outcome(False, compiled, "ended before its tests were done")
