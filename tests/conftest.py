"""Settings of the whole test suite."""

from hypothesis import settings

# Timings never decide: a loaded machine is no failure.
settings.register_profile("no_deadline", deadline=None)
settings.load_profile("no_deadline")
