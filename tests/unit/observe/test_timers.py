"""Phases add up; unknown phases and devices are refused."""

import pytest

from megatron_rl.observe import timers as module
from megatron_rl.observe.timers import Timers, peak_memory_gib


@pytest.fixture
def clock(monkeypatch):
    """A clock that advances only when told."""

    class Clock:
        now = 100.0

    monkeypatch.setattr(module.time, "perf_counter", lambda: Clock.now)
    return Clock


def test_phases_add_up_until_reset(clock):
    timers = Timers()
    for seconds in (1.5, 2.0):
        with timers("rollout"):
            clock.now += seconds
        clock.now += 10.0
    with timers("step"), timers("update"):
        clock.now += 0.25
    assert timers.seconds() == {
        "time/rollout_s": 3.5,
        "time/update_s": 0.25,
        "time/step_s": 0.25,
    }
    timers.reset()
    assert timers.seconds() == {}


def test_a_phase_that_raises_is_counted(clock):
    timers = Timers()
    with pytest.raises(KeyError), timers("score"):
        clock.now += 2.0
        raise KeyError
    assert timers.seconds() == {"time/score_s": 2.0}


def test_queued_work_is_waited_for_inside_the_phase(clock):
    def synchronize():
        clock.now += 1.0

    timers = Timers(synchronize)
    with timers("update"):
        clock.now += 0.5
    assert timers.seconds() == {"time/update_s": 1.5}  # the wait at the end, not the one before


def test_unknown_phase():
    with pytest.raises(ValueError, match="time/rollouts_s"), Timers()("rollouts"):
        pass


def test_peak_memory_on_cpu_grows_with_what_is_held():
    before = peak_memory_gib("cpu")
    held = bytearray(b"x") * (256 * 2**20)
    after = peak_memory_gib("cpu")
    assert 0.0 < before < 64.0 and len(held) == 2**28
    assert after >= before and after >= 0.25


def test_peak_memory_units(monkeypatch):
    import resource
    from types import SimpleNamespace

    usage = SimpleNamespace(ru_maxrss=3 * 2**20)
    monkeypatch.setattr(resource, "getrusage", lambda _: usage)
    monkeypatch.setattr(module.sys, "platform", "linux")
    assert peak_memory_gib("cpu") == 3.0  # KiB
    monkeypatch.setattr(module.sys, "platform", "darwin")
    assert peak_memory_gib("cpu") == 3.0 / 1024  # bytes
    monkeypatch.setattr("torch.cuda.max_memory_allocated", lambda: 5 * 2**29)
    assert peak_memory_gib("cuda") == 2.5
    with pytest.raises(ValueError, match="tpu"):
        peak_memory_gib("tpu")
