"""What all unit tests share."""

import gc
import os
import sys

import pytest

#: Threads of a process above which models of earlier tests must still hold their groups.
MOST_THREADS = 100


@pytest.fixture(autouse=True, scope="module")
def groups_end_with_their_tests():
    """Models of a module's tests keep gloo's groups alive, three threads each that poll, for as
    long as the process lives; on CPUs that slows every later test.
    """
    yield
    if len(os.listdir("/proc/self/task")) > MOST_THREADS and "megatron.core" in sys.modules:
        from megatron.core import parallel_state

        from megatron_rl.parallel.groups import destroy_groups
        from tests.support.ranks import forget_models

        forget_models()
        if parallel_state.model_parallel_is_initialized():
            destroy_groups()
        gc.collect()
