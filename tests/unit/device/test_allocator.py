"""Memory that was freed is taken again without the kernel."""

import platform
import resource
import subprocess
import sys

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
