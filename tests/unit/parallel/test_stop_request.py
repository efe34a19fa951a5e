import os
import signal

import pytest
import torch
import torch.distributed as dist

from megatron_rl.parallel.stop_request import StopRequest
from tests.support.ranks import run_on_ranks
from tests.support.tiny import cpu_device

CPU = torch.device("cpu")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_asks_and_handlers_are_put_back(number):
    cpu_device()
    before = signal.getsignal(number)
    with StopRequest() as stop:
        assert not stop.agreed(dist.group.WORLD, CPU)
        os.kill(os.getpid(), number)
        assert stop.agreed(dist.group.WORLD, CPU)
    assert signal.getsignal(number) is before


def test_a_second_interrupt_is_one():
    with pytest.raises(KeyboardInterrupt), StopRequest():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)


def _asked_on_one_rank():
    with StopRequest() as stop:
        if dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return stop.agreed(dist.group.WORLD, CPU)


def test_ranks_agree():
    assert run_on_ranks(2, _asked_on_one_rank) == [True, True]


def _told():
    world = dist.group.WORLD
    with StopRequest() as stop:
        before = stop.heard()
        stop._looked = 0.0  # not later than a second ago
        dist.barrier(world)
        if dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGTERM)
            stop.heard()
        dist.barrier(world)
        heard = stop.heard()
    with StopRequest() as later:  # of another run in the same processes
        return before, heard, stop.requested, later.heard()


def test_the_others_are_told_without_a_collective():
    assert run_on_ranks(2, _told) == [(False, True, True, False)] * 2
