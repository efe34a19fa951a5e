"""The worker of ``math.py``: ``math_worker.py CPU_S`` compares expressions with SymPy.

Reads one JSON pair [expected, answer] of trees (``answers/algebra.py``) a line. Writes "ready" (or
what is missing), then a line for each: "true", "false", "late" after CPU_S seconds of processor
time, "failed" (memory or recursion has a limit), or "killed" if something else has ended the
comparison. Ends when its input ends.

A child compares and this process watches it, because SymPy cannot be interrupted. Importing SymPy
again after each late answer would cost more than most answers.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
from typing import Any, BinaryIO, TextIO

_MEMORY_BYTES = 2 * 2**30
_DIGITS = 50
_TOLERANCE = "1e-40"
#: Values of the variables, in hundredths.
_POINTS = (137, 263, 71, -59, -181, 349, 1713, -1409)


def main() -> None:
    cpu_s = float(sys.argv[1])
    # Libraries may print to stdout: replies go to a descriptor that nothing else knows.
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    try:
        import sympy
    except ImportError as error:
        replies.write(f"{error}\n")
        return
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    sympy.N(sympy.sqrt(2), _DIGITS)  # lazy imports happen before the children are forked
    replies.write("ready\n")
    lines = os.fdopen(0, "rb", buffering=0, closefd=False)  # a child reads what is its own, no more
    while True:
        child = os.fork()
        if child == 0:
            compare(lines, replies, cpu_s)
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        if status == 0:
            return
        if os.WIFEXITED(status):
            replies.write("failed\n")
        else:
            replies.write("late\n" if os.WTERMSIG(status) == signal.SIGPROF else "killed\n")


def compare(lines: BinaryIO, replies: TextIO, cpu_s: float) -> None:
    """Answer lines until the input ends."""
    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # ends the process at any point

    while line := lines.readline():
        signal.setitimer(signal.ITIMER_PROF, cpu_s)  # of this process alone
        verdict = "true" if equal(*json.loads(line)) else "false"
        signal.setitimer(signal.ITIMER_PROF, 0.0)
        replies.write(f"{verdict}\n")


def equal(expected: list[Any], answer: list[Any]) -> bool:
    """Whether two trees are the same, or have the same value to 40 digits wherever both are real.

    With the imaginary unit in one of them, complex values count too.
    """
    import sympy

    one, other = build(expected), build(answer)
    if one == other:
        return True
    names = sorted((one.free_symbols | other.free_symbols), key=str)
    imaginary = one.has(sympy.I) or other.has(sympy.I)
    agreed = 0
    for point in _POINTS if names else _POINTS[:1]:
        values = {name: sympy.Rational(point + 38 * k, 100) for k, name in enumerate(names)}
        left, right = (sympy.N(tree.subs(values), _DIGITS) for tree in (one, other))
        if not left.is_number or not right.is_number or not (left.is_finite and right.is_finite):
            continue
        if not imaginary and not (left.is_real and right.is_real):
            continue
        size = max(abs(left), abs(right), sympy.Float("1e-20"))
        if abs(left - right) > size * sympy.Float(_TOLERANCE):
            return False
        agreed += 1
    return agreed > 0


def build(tree: list[Any]) -> Any:
    """The expression of SymPy that a tree describes."""
    import sympy

    kind, *children = tree
    if kind == "num":
        return sympy.Rational(children[0])
    if kind == "sym":
        return sympy.Symbol("v_" + children[0])
    if kind == "const":
        return {"pi": sympy.pi, "e": sympy.E, "i": sympy.I, "inf": sympy.oo}[children[0]]
    if kind == "fn":
        name = {"abs": "Abs", "ceil": "ceiling", "ln": "log"}.get(children[0], children[0])
        return getattr(sympy, name)(build(children[1]))
    built = [build(child) for child in children]
    if kind == "root":
        return sympy.real_root(*built) if built[1] % 2 else sympy.root(*built)
    return {
        "add": lambda a, b: a + b,
        "mixed": lambda a, b: a + b,
        "mul": lambda a, b: a * b,
        "div": lambda a, b: a / b,
        "neg": lambda a: -a,
        "pow": lambda a, b: a**b,
        "fact": sympy.factorial,
        "binom": sympy.binomial,
        "log": lambda base, a: sympy.log(a, base),
    }[kind](*built)


if __name__ == "__main__":
    main()
