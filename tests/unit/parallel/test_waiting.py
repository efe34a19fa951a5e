"""Ranks that wait for each other's work."""

import datetime
import subprocess
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor

import pytest
import torch.distributed as dist

from megatron_rl.parallel import waiting
from megatron_rl.parallel.waiting import wait_together
from tests.support.ranks import run_on_ranks


def quick_group():
    """Of all ranks, whose collectives wait for a second and a half at most."""
    return dist.new_group(timeout=datetime.timedelta(seconds=1.5))


def a_slow_rank():
    waiting.TICK_S = 0.2
    group, seen = quick_group(), set()
    with ThreadPoolExecutor(1) as executor:
        seconds = [0.0, 4.0][dist.get_rank()]
        futures = [executor.submit(time.sleep, seconds), executor.submit(time.sleep, 0.0)]
        raised = wait_together(futures, group, lambda *state: seen.add(state))
        return raised, [future.done() for future in futures], sorted(seen)


def test_a_slow_rank_is_not_a_lost_one():
    seen = (1, 0, 2)  # rank 1 has done none of two
    for raised, done, shown in run_on_ranks(2, a_slow_rank):
        assert (raised, done) == (False, [True, True])
        assert seen in shown and {rank for rank, _, _ in shown} == {1}


def without_work_and_with_a_failure():
    endless, failed = Future(), Future()
    failed.set_exception(KeyError("x"))
    futures = [failed, endless] if dist.get_rank() == 1 else [endless]
    return wait_together([], dist.group.WORLD), wait_together(futures, dist.group.WORLD)


def test_one_that_raises_ends_the_wait_of_all():
    assert run_on_ranks(2, without_work_and_with_a_failure) == [(False, True), (False, True)]


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
