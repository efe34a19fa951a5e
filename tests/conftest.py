"""Settings of the whole test suite."""

import functools
import gc
from pathlib import Path

import pytest
from hypothesis import settings

# Timings never decide: a loaded machine is no failure. A few examples of each property by default;
# tests/run.sh --slow tries many (--hypothesis-profile many).
settings.register_profile("few", deadline=None, max_examples=50)
settings.register_profile("many", deadline=None, max_examples=200)
settings.load_profile("few")

ROOT = Path(__file__).parents[1]
#: Begun first with several workers, so that small files are left to end with: those that look at
#: runs, those of ranks, and the longest that keep one core busy.
FIRST = (
    "tests/e2e/",
    "tests/distributed/",
    "tests/unit/rollout/servers/test_server_engine.py",
    "tests/unit/checkpoint/test_save_load.py",
    "tests/unit/router/",
    "tests/unit/test_fuzz.py",
    "tests/unit/rewards/test_code_forgeries.py",
    "tests/unit/rewards/test_sandbox.py",
    "tests/unit/algorithms/",
)


def pytest_collection_modifyitems(config, items):
    """In a worker of pytest-xdist: the longest files first. Those of the runs of tests/e2e come
    together (below), before the files that have runs of their own.
    """
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: _place(item.nodeid.partition("::")[0]))


def _place(file: str) -> tuple[int, bool]:
    found = [place for place, start in enumerate(FIRST) if file.startswith(start)]
    return min(found, default=len(FIRST)), not _looks_at_runs(file)


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

    if config.getvalue("dist") != "loadfile":
        return None
    config.option.loadscopereorder = False  # the order is that of the collection
    return ByFile(config, log)


@functools.cache
def _looks_at_runs(file: str) -> bool:
    text = (ROOT / file).read_text() if file.startswith("tests/e2e/") else ""
    return "sft_run" in text or "rl_run" in text
