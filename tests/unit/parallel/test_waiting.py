"""Ranks that wait for each other's work."""

import subprocess
import sys
from concurrent.futures import Future
from unittest import mock

import pytest
import torch.distributed as dist

from megatron_rl.errors import Stopped
from megatron_rl.parallel import waiting
from megatron_rl.parallel.waiting import wait_together
from tests.support.ranks import run_on_ranks


def a_slow_rank():
    """Rank 1 has one done of two; the other is done once that was told three times."""
    slow, done = Future(), Future()
    done.set_result(None)
    told = []

    def show(*state):
        told.append(state)
        if len(told) == 3:
            slow.set_result(None)

    futures = [done, slow] if dist.get_rank() == 1 else [done]
    with mock.patch.object(waiting, "TICK_S", 0.05):
        return wait_together(futures, dist.group.WORLD, show), told


def test_ranks_stay_in_touch_while_one_has_work():
    assert run_on_ranks(2, a_slow_rank) == [(False, [(1, 1, 2)] * 3)] * 2


def a_failure(to_the_end):
    """Rank 1 has one that has raised and one that ends when that is told."""
    last, failed = Future(), Future()
    failed.set_exception(KeyError("x"))
    futures = [failed, last] if dist.get_rank() == 1 else []
    told = []

    def show(*state):
        told.append(state)
        last.set_result(None)

    with mock.patch.object(waiting, "TICK_S", 0.05):
        return wait_together(futures, dist.group.WORLD, show, to_the_end=to_the_end), told


def test_one_that_raises_ends_the_wait_of_all():
    assert run_on_ranks(2, a_failure, False) == [(True, [])] * 2


def test_or_the_others_are_waited_for_as_well():
    assert run_on_ranks(2, a_failure, True) == [(True, [(1, 1, 2)])] * 2


def a_stop():
    """Rank 1 has work without end, and rank 0 hears that the run is to stop."""
    futures, asked = ([Future()], []) if dist.get_rank() == 1 else ([], [False, False, True])
    with mock.patch.object(waiting, "TICK_S", 0.05), pytest.raises(Stopped):
        wait_together(futures, dist.group.WORLD, stop=lambda: bool(asked) and asked.pop(0))
    return asked


def test_a_stop_that_one_rank_has_heard_ends_the_wait_of_all():
    assert run_on_ranks(2, a_stop) == [[], []]


def test_what_is_done_is_not_given_up():
    done = Future()
    done.set_result(None)
    alone = mock.Mock(**{"size.return_value": 1})
    assert wait_together([done], alone, stop=lambda: True) is False


RANK = """
import os, sys
from concurrent.futures import Future
import torch.distributed as dist
from megatron_rl.device.lost_ranks import lost_ranks
from megatron_rl.parallel.waiting import wait_together

rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=rank, world_size=2)
wait_together([], dist.group.WORLD)
if rank == 1:
    os._exit(3)
try:
    wait_together([Future()], dist.group.WORLD)
except RuntimeError as error:
    print("lost:", lost_ranks(error), flush=True)
    os._exit(0)
"""


@pytest.mark.slow
def test_a_rank_that_has_died_is_noticed(tmp_path):
    words = [sys.executable, "-c", RANK]
    ranks = [
        subprocess.Popen([*words, str(rank), str(tmp_path / "store")], stdout=subprocess.PIPE)
        for rank in range(2)
    ]
    try:
        heard = ranks[0].communicate(timeout=120)[0].decode()
        assert ranks[1].wait(120) == 3
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate()
    assert heard.startswith("lost: ") and "None" not in heard
