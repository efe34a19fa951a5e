"""Memory that the C library keeps for itself on a CPU."""

from __future__ import annotations

import ctypes

#: Of glibc's malloc.h.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
#: Bytes that may lie free at the end of the heap, and the largest block that is taken from the heap
#: (glibc allows no more).
KEPT, LARGEST = 256 << 20, 32 << 20


def keep_freed_memory() -> None:
    """Let glibc keep what is freed for the next tensor, up to `KEPT`.

    By default it gives memory back to the kernel as soon as a few of the largest blocks lie free.
    Every pass over a model frees and takes as much again, and its pages have to be found and
    cleared anew each time. Other C libraries are left alone.
    """
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    if set_option is not None:
        set_option(_TRIM_THRESHOLD, KEPT)
        set_option(_MMAP_THRESHOLD, LARGEST)
