"""Memory that the C library keeps for itself on a CPU."""

from __future__ import annotations

import ctypes
from typing import Any

#: Of glibc's malloc.h.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8
#: Bytes that may lie free at the end of the heap, and the largest block that is taken from the heap
#: (glibc allows no more).
KEPT, LARGEST = 256 << 20, 32 << 20
#: Of mman.h, on Linux. A huge page has this many bytes.
_MADV_HUGEPAGE, _HUGE_PAGE = 14, 2 << 20


def keep_freed_memory() -> None:
    """Let glibc keep what is freed for the next tensor, up to `KEPT`, and take it in huge pages.

    By default it gives memory back to the kernel as soon as a few of the largest blocks lie free.
    Every pass over a model frees and takes as much again, and its pages have to be found and
    cleared anew each time. Other C libraries are left alone.
    """
    library = ctypes.CDLL(None)
    set_option = getattr(library, "mallopt", None)
    if set_option is not None:
        set_option(_TRIM_THRESHOLD, KEPT)
        set_option(_MMAP_THRESHOLD, LARGEST)
        set_option(_ARENA_MAX, 1)  # of another heap, of a thread's own, all this is not true
        _grow_in_huge_pages(library)


def _grow_in_huge_pages(library: Any) -> None:
    """Make glibc's heap nearly `KEPT` larger, and ask the kernel for huge pages there: tensors of a
    pass lie on a few hundred pages then and not on tens of thousands, more than a core remembers.
    Pages come with their first use. A kernel that has none refuses, or takes small ones.
    """
    if not hasattr(library, "sbrk") or not hasattr(library, "madvise"):
        return
    library.sbrk.restype, library.sbrk.argtypes = ctypes.c_void_p, [ctypes.c_ssize_t]
    library.malloc.restype, library.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    library.free.restype, library.free.argtypes = None, [ctypes.c_void_p]
    library.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    first = library.sbrk(0)
    size = LARGEST // 2  # larger ones are not of the heap
    # All free, it stays below `KEPT`.
    blocks = [library.malloc(size) for _ in range(KEPT // size - 2)]
    last = library.sbrk(0)
    for block in blocks:
        library.free(block)
    first = -(-first // _HUGE_PAGE) * _HUGE_PAGE
    if last > first:
        library.madvise(first, last - first, _MADV_HUGEPAGE)
