"""What tests of tools/launch/torchrun.sh share."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import time
from pathlib import Path
from typing import Any

from tests.support.runs import ROOT, TIMEOUT_S

_OF_RANKS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
SCRIPT = str(ROOT / "tools" / "launch" / "torchrun.sh")


def environment(**settings: Any) -> dict[str, str]:
    """Of a node's torchrun.sh: this process's, with settings of the script."""
    kept = {k: v for k, v in os.environ.items() if k not in _OF_RANKS}
    return {**kept, "PYTHON": sys.executable, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | {
        name: str(value) for name, value in settings.items()
    }


def wait_for(text: str, log: Path, seconds: float = TIMEOUT_S) -> None:
    """Wait until the log holds the text."""
    end = time.monotonic() + seconds
    while text not in log.read_text():
        assert time.monotonic() < end, log.read_text()[-4000:]
        time.sleep(0.05)


def has_ipv6():
    """Whether this machine has its own address in IPv6."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET6) as own:
        own.bind(("::1", 0))
        return True
    return False
