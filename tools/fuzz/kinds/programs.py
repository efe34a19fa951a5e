"""Programs for the code sandbox: wrong ones never pass, right ones do."""

from __future__ import annotations

import contextlib
import json
import random
from pathlib import Path
from typing import Iterator

import psutil

from megatron_rl.rewards.sandbox import Job, Limits, run_program
from tools.fuzz.kind import Judge, Kind, Verdict, Wrong
from tools.fuzz.kinds.wire import ODD_FRAMES
from tools.fuzz.mutate import ODD, RAW, changed

#: Takes the pipe over in the program's process and speaks its protocol: `speak` gives the reply to
#: each request, `raw` the bytes.
TAKEN_OVER = """
import os, sys, json, gc
from megatron_rl.rewards import sandbox_wire as wire
server = next(o for o in gc.get_objects() if type(o).__name__ == 'Server')
q, a = server._requests, server._answers
wire.send(a, [server._number, 'value'])  # the program has been executed
def frame(text): return len(text).to_bytes(4, 'little') + text
def speak(reply):
    while True:
        number, verb, *rest = wire.receive(q)
        wire.send(a, [number, *reply(verb, rest)])
def raw(data):
    for _ in range(2):
        number = wire.receive(q)[0]
        os.write(a, data(number.encode()))
"""
_TESTS = "def check(candidate):\n    for x in (2, 5):\n        assert candidate(x) == [x, x * x]\n"
_LIMITS = Limits(cpu_s=1, wall_s=2.0, memory_mib=256)
_EVERYTHING_EQUAL = """
class E:
    def __eq__(self, other): return True
    def __ne__(self, other): return False
    def __hash__(self): return 0
class L(list):
    __eq__ = E.__eq__
    __ne__ = E.__ne__
class I(int):
    __eq__ = E.__eq__
    __hash__ = int.__hash__
"""
_HARMLESS = (
    *("", "", "print('passed')", "import math, collections", "x = [0] * 1000"),
    *("class A:\n    pass", "def check(c): pass", "def g(x): return f(x)", "candidate = 3"),
)
_HOSTILE = (
    *("import builtins\nbuiltins.exec = lambda *a: None", "import sys\nsys.modules.clear()"),
    *("import builtins\nbuiltins.AssertionError = KeyError", "import os\nos.write = print"),
    *("import builtins\nbuiltins.list = tuple", "import sys\nsys.settrace(lambda *a: None)"),
    *("import json\njson.loads = json.dumps = lambda *a: 'passed'", "import os\nos.close(1)"),
    *("import gc\ngc.disable()", "import sys\nsys.setrecursionlimit(50)", "del __builtins__"),
    *("import os\nfor d in range(9):\n    try: os.write(d, b'passed\\n')\n    except OSError: 0",),
    *("import os\nos.closerange(0, 9)", "import atexit, os\natexit.register(os._exit, 0)"),
    *(
        "import signal\nsignal.signal(15, signal.SIG_IGN)",
        "raise SystemExit",
        "import os\nos._exit(0)",
    ),
)
_WRONG = (
    *("None", "[x, x]", "(x, x * x)", "{x, x * x}", "[[x, x * x]]", "[x, x * x, None]", "[x]"),
    *("'x' * 10**6", "float('nan')", "iter([x, x * x])", "map(int, [x, x * x])", "range(x)"),
    *("E()", "[E(), E()]", "L([x])", "[I(0), I(1)]", "E", "lambda: [x, x * x]", "1 / 0", "x.y"),
    *("__import__('os')._exit(0)", "exit()", "open('/etc/passwd').read()", "[x, -x * x]"),
    *("__import__('os').fork()", "str([x, x * x])", "b'ab'", "[x, x * x + 1e-9]", "[x, f]"),
    *("eval('(' * 99 + ')' * 99)", "[[]] * 10**6", "10**10000", "__import__('os').kill(1, 9)"),
)


def make(rng: random.Random) -> tuple[str, bool]:
    """A program, and whether it is right."""
    way = rng.randrange(4)
    if way == 0:
        return f"{rng.choice(_HARMLESS)}\ndef f(x):\n    return [x, x * x]\n", True
    before = "\n".join(rng.choice(_HOSTILE + _HARMLESS) for _ in range(rng.randrange(3)))
    if way in (1, 2):
        body = f"def f(x):\n    return {rng.choice(_WRONG)}\n"
        return f"{_EVERYTHING_EQUAL}\n{body}{before}\n", False
    if rng.random() < 0.3:
        text = rng.choice(RAW).encode("utf-8", "surrogatepass")
        return f"{TAKEN_OVER}\nraw(lambda n: frame({text!r}))\n", False
    value = rng.choice([[2, 4], [5, 25], *ODD_FRAMES, *ODD])
    reply = [rng.choice(["value", "value", "error", "callback", "passed"]), value, None]
    reply = changed(rng, reply, rng.randrange(2))
    return f"{TAKEN_OVER}\nspeak(lambda v, r: json.loads({json.dumps(reply)!r}))\n", False


@contextlib.contextmanager
def judging(folder: Path) -> Iterator[Judge]:
    """Judge by the program's making; also no process of it may be left."""

    def judge(case: tuple[str, bool]) -> Verdict:
        program, right = case
        outcome = run_program(Job([program], "f", _TESTS), _LIMITS)
        if outcome.passed != right:
            raise Wrong(f"{outcome}: {program[-300:]!r}")
        if not outcome.reason.isprintable() or len(outcome.reason) > 300:
            raise Wrong(f"a reason that is no line: {outcome.reason!r}")
        left = [p.pid for p in psutil.Process().children() if "sandbox_start" in _words(p)]
        if left:
            raise Wrong(f"processes are left: {left}")
        return Verdict.TAKEN if right else Verdict.REFUSED

    yield judge


def _words(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return ""


KIND = Kind("programs", make, judging, deadline_s=60.0)
