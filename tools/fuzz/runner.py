"""Runs cases of a kind and counts what should not happen."""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import gc
import random
import signal
import tempfile
import time
import traceback
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Iterator

from megatron_rl.errors import RunFailed, UserError
from tools.fuzz.kind import Judge, Kind, Verdict, Wrong

#: Cases before memory is first measured: what is imported and cached at first use.
WARM_UP = 200
#: Longest message of a refusal, characters.
LONGEST = 1000


class _Hang(BaseException):
    """The deadline has passed; no handler of errors may take it for one."""


@dataclass
class Result:
    """The results of a kind's cases."""

    name: str
    counts: Counter[str] = field(default_factory=Counter)  #: taken, refused, exceptions, ...
    found: list[str] = field(default_factory=list)  #: what is wrong, a case each
    grown_bytes: int = 0  #: peak of memory above that after the warm-up
    seconds: float = 0.0
    slowest_s: float = 0.0

    @property
    def tried(self) -> int:
        return sum(self.counts.values())

    @property
    def good(self) -> bool:
        """Nothing was found, and memory stayed within 64 MiB."""
        return not self.found and self.grown_bytes <= 64 << 20


def counted(kind: Kind, count: int) -> int:
    """Number of cases of a kind to run, if ``count`` of each are requested."""
    return max(1, round(count * kind.share))


def run(kind: Kind, count: int, seed: int, first: int = 0, most_s: float = 1e9) -> Result:
    """Judge the cases ``first`` to ``first + count``; stop early after ``most_s`` seconds."""
    result, start, base = Result(kind.name), time.monotonic(), None
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder, kind.judging(Path(folder)) as judge:
        for number in range(first, first + count):
            if number - first == min(WARM_UP, count // 5):
                base = _reset_peak()
            case = kind.make(random.Random(f"{seed}/{kind.name}/{number}"))
            before = time.monotonic()
            outcome, said = _outcome(judge, case, kind.deadline_s)
            result.slowest_s = max(result.slowest_s, time.monotonic() - before)
            result.counts[outcome] += 1
            if said:
                result.found.append(f"{kind.name} {number} of seed {seed}: {outcome}: {said}")
            if time.monotonic() - start > most_s:
                break
        result.grown_bytes = 0 if base is None else max(0, _peak() - base)
    result.seconds = time.monotonic() - start
    return result


def _outcome(judge: Judge, case: Any, deadline_s: float) -> tuple[str, str]:
    """The column a case counts in, and what is wrong, "" for nothing."""
    try:
        with _deadline(deadline_s):
            return judge(case).value, ""
    except (UserError, RunFailed) as error:
        return _refusal(str(error))
    except Wrong as error:
        return "wrong", str(error)
    except _Hang:
        return "hangs", f"over {deadline_s:g} s: {shown(case)}"
    except BaseException as error:  # noqa: BLE001 - whatever it is: it is what is looked for
        if isinstance(error, KeyboardInterrupt):
            raise
        frame = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{frame.filename.rpartition('/')[2]}:{frame.lineno}"
        return (
            "exceptions",
            f"{type(error).__name__} {str(error)[:200]!r} at {place}: {shown(case)}",
        )


def _refusal(said: str) -> tuple[str, str]:
    """A refusal has to be one line that can be printed."""
    try:
        said.encode("utf-8")
    except UnicodeEncodeError:
        return "wrong", f"a message that cannot be printed: {said[:200]!a}"
    if "\n" in said or len(said) > LONGEST:
        return "wrong", f"a message of {len(said):,} characters, more than a line: {said[:200]!r}"
    return Verdict.REFUSED.value, ""


@contextlib.contextmanager
def _deadline(seconds: float) -> Iterator[None]:
    """Interrupts the block after some seconds; what does not return to Python ends the process with
    a trace of where it is.
    """

    def interrupt(*_: object) -> None:
        raise _Hang

    before = signal.signal(signal.SIGALRM, interrupt)
    faulthandler.dump_traceback_later(10 * seconds, exit=True)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        faulthandler.cancel_dump_traceback_later()
        signal.signal(signal.SIGALRM, before)


def shown(case: Any) -> str:
    """The beginning of a case, in ASCII."""
    text = ascii(case)
    return text if len(text) <= 300 else f"{text[:300]}... ({len(text):,} characters)"


def _reset_peak() -> int:
    """Peak memory counts from here; the memory in use, bytes.

    What the C library keeps of freed memory would hide as much growth: it goes back first.
    """
    gc.collect()
    getattr(ctypes.CDLL(None), "malloc_trim", int)(0)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _peak() -> int:
    return _status("VmHWM")


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))
