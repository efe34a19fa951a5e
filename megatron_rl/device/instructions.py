"""What the processor has instructions for (no torch)."""

from __future__ import annotations

import re
from pathlib import Path

#: What says so in /proc/cpuinfo: x86 (vectors, tiles), ARM.
_OF_BF16 = {"avx512_bf16", "amx_bf16", "bf16"}


def has_bf16(root: Path = Path("/")) -> bool | None:
    """Whether the processor multiplies in bf16; None if it does not say. ``root``: of the file
    system to read.
    """
    try:
        text = (root / "proc/cpuinfo").read_text()
    except OSError:
        return None
    found = re.search(r"^(?:flags|Features)\s*:(.*)$", text, re.MULTILINE)
    return None if found is None else bool(_OF_BF16 & set(found[1].split()))


def slow_type(dtype: str, root: Path = Path("/")) -> str | None:
    """What is slow about computing in ``dtype`` (of ``model.dtype``) on this processor, and the
    remedy; None: nothing is.
    """
    if dtype != "bf16" or has_bf16(root) is not False:
        return None
    return (
        "this CPU has no bf16 instructions: large products take up to 150 times as long as in "
        "fp32, a step of a tiny model twice as long; set model.dtype to fp32"
    )
