"""Becomes another program that gets SIGTERM when the process that started it dies.

    python -I -S with_parent.py PARENT_PID PROGRAM ARGUMENT...

A run then saves a checkpoint and ends, and torchrun ends its ranks, however its study died.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def end_with(parent: int, number: int) -> None:
    """Ask the kernel for a signal when the parent dies; it stays with the process over exec, and
    not over fork. Exits if ``parent`` is the parent no more.
    """
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, ctypes.c_ulong(number))
    if os.getppid() != parent:  # it died before it could be heard of
        sys.exit(128 + number)


def main() -> None:
    """Ask for the signal, then become PROGRAM."""
    parent, command = int(sys.argv[1]), sys.argv[2:]
    end_with(parent, signal.SIGTERM)
    os.execv(command[0], command)


if __name__ == "__main__":
    main()
