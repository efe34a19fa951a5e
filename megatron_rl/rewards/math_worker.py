"""The worker of ``math.py``: ``math_worker.py CPU_S`` compares answers with math-verify.

Reads one JSON pair [expected, answer] a line. Writes "ready" (or what is missing), then a line for
each: "true", "false", "late" after CPU_S seconds of processor time, "failed" (memory or recursion
has a limit), or "killed" if something else has ended the comparison. Ends when its input ends.

A child compares and this process watches it: SymPy cannot be interrupted, and importing it again
after each answer that takes too long would cost more than most of them.
"""

from __future__ import annotations

import json
import logging
import os
import resource
import signal
import sys
from typing import BinaryIO, TextIO

_MEMORY_BYTES = 2 * 2**30


def main() -> None:
    cpu_s = float(sys.argv[1])
    # Libraries print where they like: replies go to a descriptor nothing else knows.
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    try:
        from math_verify import parse, verify
    except ImportError as error:
        replies.write(f"{error}\n")
        return
    logging.disable(logging.CRITICAL)
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # No signals of its own: the numbers None switch math-verify's limits off. What it imports at
    # first use is there before the children are made.
    one = parse("$1$", parsing_timeout=None)
    replies.write("ready\n" if one and verify(one, one, timeout_seconds=None) else "no parser\n")
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
    """Answers lines until there are no more."""
    from math_verify import parse, verify

    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # ends the process, wherever it is

    while line := lines.readline():
        signal.setitimer(signal.ITIMER_PROF, cpu_s)  # of this process alone
        expected, answer = (
            parse(f"${text.strip('$')}$", parsing_timeout=None) for text in json.loads(line)
        )
        equal = bool(expected and answer) and verify(expected, answer, timeout_seconds=None)
        signal.setitimer(signal.ITIMER_PROF, 0.0)
        replies.write("true\n" if equal else "false\n")


if __name__ == "__main__":
    main()
