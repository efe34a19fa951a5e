"""Runs a command, and ends it when the parent process ends, even by a kill. A script of its own:

    python supervisor.py ARGV...

A server that outlives its run would keep its memory and its port. A signal to the process group
reaches the command directly; this process then waits for the command to end.
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
    """Run the command until it ends or the parent does."""
    parent = os.getppid()
    signal.signal(signal.SIGTERM, lambda number, frame: None)
    child = subprocess.Popen(sys.argv[1:])
    while child.poll() is None:
        if os.getppid() != parent:
            os.killpg(os.getpgrp(), signal.SIGTERM)  # the command and all that it has started
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(GRACE_S)
            os.killpg(os.getpgrp(), signal.SIGKILL)  # this process too
        time.sleep(LOOK_EVERY_S)
    return child.returncode


if __name__ == "__main__":
    sys.exit(main())
