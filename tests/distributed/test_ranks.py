"""The pool of rank processes itself."""

import os
import time

import pytest

from tests.support.ranks import RankFailure, run_on_ranks


def rank_times(factor):
    import torch
    import torch.distributed as dist

    total = torch.tensor(float(dist.get_rank()))
    dist.all_reduce(total)
    return os.getpid(), dist.get_rank() * factor, total.item(), torch.get_num_threads()


def fail_on_rank_one(others_wait):
    import torch.distributed as dist

    if dist.get_rank() == 1:
        raise KeyError("the reason")
    if others_wait:
        dist.barrier()


def die_on_rank_one():
    import torch.distributed as dist

    if dist.get_rank() == 1:
        print("last words", flush=True)
        os._exit(3)


def sleep(seconds):
    time.sleep(seconds)


def test_results_come_in_rank_order_from_the_same_processes():
    first = run_on_ranks(2, rank_times, 10)
    second = run_on_ranks(2, rank_times, 5)
    assert [answer[1:] for answer in first] == [(0, 1.0, 1), (10, 1.0, 1)]
    assert [answer[1] for answer in second] == [0, 5]
    assert [answer[0] for answer in first] == [answer[0] for answer in second]


def test_an_exception_carries_the_traceback_and_leaves_the_pool_usable():
    before = [answer[0] for answer in run_on_ranks(2, rank_times, 1)]
    with pytest.raises(RankFailure, match="rank 1:\n(.*\n)*KeyError: 'the reason'"):
        run_on_ranks(2, fail_on_rank_one, False)
    assert [answer[0] for answer in run_on_ranks(2, rank_times, 1)] == before


@pytest.mark.slow
@pytest.mark.parametrize(
    "function, args, timeout_s, message",
    [
        (
            fail_on_rank_one,
            (True,),
            60.0,
            "KeyError: 'the reason'(.*\n)*ranks \\[0\\] were waiting",
        ),
        (die_on_rank_one, (), 60.0, "rank 1 has died .exit code 3.:\n(.*\n)*last words"),
        (sleep, (60,), 1.0, "ranks \\[0, 1\\] have not answered within 1.0 s"),
    ],
    ids=["waiting", "dead", "late"],
)
def test_ranks_that_do_not_answer_are_ended_and_new_ones_started(
    function, args, timeout_s, message
):
    before = {answer[0] for answer in run_on_ranks(2, rank_times, 1)}
    with pytest.raises(RankFailure, match=message):
        run_on_ranks(2, function, *args, timeout_s=timeout_s)
    for process in before:
        with pytest.raises(ProcessLookupError):
            os.kill(process, 0)
    assert before.isdisjoint(answer[0] for answer in run_on_ranks(2, rank_times, 1))
