"""Settings of the whole test suite."""

import functools
import gc
from pathlib import Path

import pytest
from hypothesis import settings

# Timings never decide: a loaded machine is no failure.
settings.register_profile("no_deadline", deadline=None)
settings.load_profile("no_deadline")

ROOT = Path(__file__).parents[1]


def pytest_collection_finish():
    """Tests and modules stay to the end: the garbage collector need not look at them again."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(optionalhook=True)  # of pytest-xdist
def pytest_xdist_make_scheduler(config, log):
    """With several workers (``-n``), a file's tests stay together, for what they share is made once
    a worker; so do the files that look at the runs of tests/e2e/conftest.py.
    """
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return "runs" if _looks_at_runs(file) else file

    return ByFile(config, log) if config.getvalue("dist") == "loadfile" else None


@functools.cache
def _looks_at_runs(file: str) -> bool:
    text = (ROOT / file).read_text() if file.startswith("tests/e2e/") else ""
    return "sft_run" in text or "rl_run" in text
