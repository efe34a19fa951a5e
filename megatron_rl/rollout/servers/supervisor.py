"""Runs a command that ends with its parent, even one that is killed: a script of its own.

    python leash.py WORD...

A server that outlived the run that started it would hold its memory and its port. Signals to the
process group reach the command by themselves; this process waits for it to end.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time

LOOK_EVERY_S, GRACE_S = 0.5, 10.0


def main() -> int:
    """Run the command to its end, or to the parent's."""
    parent = os.getppid()
    signal.signal(signal.SIGTERM, lambda number, frame: None)
    child = subprocess.Popen(sys.argv[1:])
    while child.poll() is None:
        if os.getppid() != parent:
            os.killpg(os.getpgrp(), signal.SIGTERM)  # the command and all it has started
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(GRACE_S)
            os.killpg(os.getpgrp(), signal.SIGKILL)  # this process too
        time.sleep(LOOK_EVERY_S)
    return child.returncode


if __name__ == "__main__":
    sys.exit(main())
