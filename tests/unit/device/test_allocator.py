"""Memory that was freed is taken again without the kernel."""

import platform
import resource
import subprocess
import sys
from pathlib import Path

import pytest

#: Fills 64 MiB in blocks of 1 MiB twice, frees them, and prints the page faults of the second time.
PROGRAM = """
import resource, sys
from megatron_rl.device.allocator import keep_freed_memory
if sys.argv[1] == "kept":
    keep_freed_memory()
for _ in range(2):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [b"x" * (number + (1 << 20)) for number in range(64)]
    del blocks
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_freed_memory_is_taken_again_without_page_faults():
    faults = {
        kind: int(
            subprocess.run(
                [sys.executable, "-c", PROGRAM, kind], check=True, capture_output=True, text=True
            ).stdout
        )
        for kind in ("kept", "given back")
    }
    pages = (64 << 20) // resource.getpagesize()
    assert faults["given back"] > pages / 2
    assert faults["kept"] < pages / 50


#: Asks for huge pages, fills 64 MiB in blocks of 1 MiB, and prints the KiB that lie on huge pages.
HUGE = """
from megatron_rl.device.allocator import keep_freed_memory
keep_freed_memory()
blocks = [b"x" * (number + (1 << 20)) for number in range(64)]
lines = open("/proc/self/smaps_rollup").read().splitlines()
print(next(line.split()[1] for line in lines if line.startswith("AnonHugePages")))
"""
ENABLED = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
@pytest.mark.skipif(
    not ENABLED.exists() or "[never]" in ENABLED.read_text(), reason="no huge pages"
)
def test_the_heap_lies_on_huge_pages():
    ran = subprocess.run([sys.executable, "-c", HUGE], check=True, capture_output=True, text=True)
    assert int(ran.stdout) > 32 << 10
