"""Settings of the whole test suite."""

import pytest
from hypothesis import settings

# Timings never decide: a loaded machine is no failure.
settings.register_profile("no_deadline", deadline=None)
settings.load_profile("no_deadline")


@pytest.hookimpl(tryfirst=True)  # the plugin reads the marks in its own hook
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """With several workers (``-n``), a file's tests stay together, for what they share is made once
    a worker; so do the files that look at the runs of tests/e2e/conftest.py.
    """
    of_runs = {item.path for item in items if "sft_run" in getattr(item, "fixturenames", ())}
    for item in items:
        name = "runs" if item.path in of_runs else str(item.path)
        item.add_marker(pytest.mark.xdist_group(name))
