"""Counts the processor cores that this process may use."""

from __future__ import annotations

import math
import os
from pathlib import Path


def usable_cores(root: Path = Path("/")) -> int:
    """Cores of the affinity mask, or fewer if a control group (a container's limit) allows less
    processor time; at least 1. ``root``: of the file system to read.
    """
    return max(1, math.ceil(min(len(os.sched_getaffinity(0)), _quota(root))))


def _quota(root: Path) -> float:
    """Processor time that the tightest control group allows, in cores; inf without a limit."""
    least = math.inf
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers and "cpu" not in controllers.split(","):
            continue
        top = root / "sys/fs/cgroup" / ("cpu" if controllers else "")
        # A container sees its own group at the top, under any outside name.
        folder = top / path.strip("/")
        for group in (folder, *folder.parents):
            least = min(least, _limit(group))
            if group == top:
                break
    return least


def _limit(group: Path) -> float:
    words = _read(group / "cpu.max").split()  # version 2: "quota period", or "max period"
    if not words:  # version 1, where -1 is no limit
        words = [*_read(group / "cpu.cfs_quota_us").split()]
        words += _read(group / "cpu.cfs_period_us").split()
    if len(words) != 2 or words[0] in ("max", "-1"):
        return math.inf
    return int(words[0]) / int(words[1])


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
