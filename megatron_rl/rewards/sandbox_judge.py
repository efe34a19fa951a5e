"""The trusted side of the sandbox: runs the tests, which call the program through a pipe.

The tests have their own interpreter, with modules and builtins that the program never sees. Writes
lines to the trainer's pipe: "ready PID HELD", "compiled", and "passed", "failed WHY" or "killed".
Standard library only.
"""

from __future__ import annotations

import json
import os
import signal
from typing import Any

from megatron_rl.rewards import confinement
from megatron_rl.rewards.sandbox_remote import Killed, Program, Remote, Stopped, clean
from megatron_rl.rewards.sandbox_tests import run_tests

_MAX_REASON = 200


def main(verdict: int, program: Program, cpu_s: int, memory_mib: int, parent: int) -> None:
    """Judges the job on standard input and ends the process."""
    word, text = program.greeting()
    try:
        if word != "confined":
            raise OSError(text)
        with open(0, "rb") as file:
            job = json.loads(file.read())
        signal.signal(signal.SIGTERM, lambda *_: _leave(program))
        confinement.hide()
        confinement.confine(cpu_s, memory_mib, parent, may_kill=program.pid)
    except (OSError, KeyError, ValueError) as error:
        os.write(verdict, f"{clean(str(error), _MAX_REASON)} on {os.uname().machine}\n".encode())
        _leave(program)
    program.cpu_s = cpu_s
    os.write(verdict, f"ready {program.pid} {text}\n".encode())
    line = _judge(job, program, verdict)
    os.write(verdict, line.encode("utf-8", "replace") + b"\n")
    _leave(program)


def _leave(program: Program) -> None:
    program.end()
    os._exit(0)


def _judge(job: dict[Any, Any], program: Program, verdict: int) -> str:
    try:
        program.ask("load", job["programs"], job["entry_point"])
        os.write(verdict, b"compiled\n")
        if job["cases"]:
            run_cases(program, job["entry_point"], job["cases"])
        else:
            run_tests(program, job["entry_point"], job["prompt"], job["tests"])
        if program.stopped is not None:
            raise program.stopped
        if not program.calls:
            raise AssertionError("the tests have called nothing of the program")
    except Killed:
        return "killed"
    # SystemExit and the like in a test are failures as well.
    except BaseException as error:  # noqa: BLE001
        return "killed" if isinstance(program.stopped, Killed) else f"failed {_reason(error)}"
    return "passed"


def _reason(error: BaseException) -> str:
    try:
        text = getattr(error, "of_program", None) or f"{type(error).__name__}: {error}"
        if isinstance(error, Stopped):
            text = str(error)
        return clean(text.rstrip(": "), _MAX_REASON)
    # The text of a long integer, or of an object of the program, can raise.
    except BaseException:  # noqa: BLE001
        return type(error).__name__


def run_cases(program: Program, entry_point: str, cases: list[Any]) -> None:
    """Each case is [input, output]: texts if there is no entry point, else arguments and result."""
    if entry_point:
        program.ask("execute")
    for number, (given, expected) in enumerate(cases, 1):
        if entry_point:
            found = _listed(program.call(entry_point, tuple(given), {}))
            right = type(found) is not Remote and found == _listed(expected)
        else:
            found = program.value("run", given)
            program.calls += 1
            right = type(found) is str and _lines(found) == _lines(expected)
        if not right:
            raise AssertionError(f"case {number} of {len(cases)}")


def _listed(value: Any) -> Any:
    """Tuples as lists, because cases are in JSON, which has no tuples."""
    return [_listed(item) for item in value] if type(value) in (list, tuple) else value


def _lines(text: str) -> list[str]:
    """Lines without white space at both ends, and without empty lines at the end."""
    return [line.strip() for line in text.rstrip().split("\n")]
