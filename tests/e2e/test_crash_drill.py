"""The drill of tools/bench, in small."""

import subprocess
import sys

import pytest

from tests.support.runs import ROOT


@pytest.mark.slow
def test_a_run_that_is_killed_three_times_ends_like_one_that_is_not():
    script = str(ROOT / "tools" / "bench" / "crash_drill.py")
    words = ["--kills", "3", "--steps", "40", "--seed", "1"]
    done = subprocess.run(
        [sys.executable, script, *words], capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("differences from the undisturbed run: none\n")
    assert "\n3 kills, " in done.stdout
