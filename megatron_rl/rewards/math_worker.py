"""The worker of ``math.py``: compares answers with math-verify.

Reads one JSON pair [expected, answer] a line. Writes "ready" (or what is missing), then "true" or
"false" a line. Ends when its input ends. The process at the other end of the pipe kills it when an
answer takes too long; its own limit is for the case that this process is gone.
"""

from __future__ import annotations

import json
import logging
import os
import resource
import sys

_MEMORY_BYTES = 2 * 2**30
_CPU_S = 20


def main() -> None:
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
    # No signals: the numbers 0 and None switch math-verify's own limits off.
    replies.write("ready\n" if parse("$1$", parsing_timeout=None) else "no LaTeX parser\n")
    for line in sys.stdin:
        used = resource.getrusage(resource.RUSAGE_SELF)
        limit = int(used.ru_utime + used.ru_stime) + _CPU_S
        resource.setrlimit(resource.RLIMIT_CPU, (limit, resource.RLIM_INFINITY))
        expected, answer = (
            parse(f"${text.strip('$')}$", parsing_timeout=None) for text in json.loads(line)
        )
        equal = bool(expected and answer) and verify(expected, answer, timeout_seconds=None)
        replies.write("true\n" if equal else "false\n")


if __name__ == "__main__":
    main()
