"""Workers side by side, what ends them, and that a busy machine changes no verdict."""

import errno
import os
import signal
import threading
import time

import pytest

from megatron_rl.errors import RunFailed
from megatron_rl.rewards import math as math_room
from megatron_rl.rewards.math import MathVerifier

START = "import os, signal, sys, time\nfrom pathlib import Path\nHERE = Path(__file__).parent\n"
#: Only SymPy tells them apart: they equal the reference, or nearly do.
SAME, OTHER = "\\sqrt{5+2\\sqrt{6}}", "\\sqrt{2}+\\sqrt{3}+10^{-30}"
ENDLESS = ("pow", ("num", "9"), ("pow", ("num", "9"), ("pow", ("num", "9"), ("num", "9"))))
LOOP = "print('ready', flush=True)\nfor line in sys.stdin:\n"


@pytest.fixture
def worker(tmp_path, monkeypatch):
    """Puts a worker of the test's own in the place of the one that compares."""

    def put(body: str) -> None:
        script = tmp_path / "worker.py"
        lines = "".join(f"    {line}\n" for line in body.splitlines())
        script.write_text(START + LOOP + lines)
        monkeypatch.setattr(math_room, "_WORKER", script)

    return put


def judge(verify: MathVerifier, answer: str = SAME) -> float:
    return verify({"answer": "\\sqrt{2}+\\sqrt{3}"}, f"\\boxed{{{answer}}}").value


def side_by_side(verify: MathVerifier, count: int) -> list[float]:
    values = [-1.0] * count

    def one(place: int) -> None:
        values[place] = judge(verify)

    threads = [threading.Thread(target=one, args=(place,)) for place in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return values


def test_as_many_workers_as_are_asked_at_once(worker):
    worker(  # an answer that comes only when another is being worked on
        "(HERE / str(os.getpid())).touch()\n"
        "while len(list(HERE.glob('[0-9]*'))) < 2: time.sleep(0.01)\n"
        "print('true', flush=True)"
    )
    assert side_by_side(MathVerifier(), 2) == [1.0, 1.0]


def test_a_free_worker_is_used_again(worker, tmp_path):
    worker("(HERE / str(os.getpid())).touch()\nprint('true', flush=True)")
    verify = MathVerifier()
    assert [judge(verify) for _ in range(3)] == [1.0] * 3
    assert len(list(tmp_path.glob("[0-9]*"))) == 1


def test_elapsed_time_alone_fails_no_answer(worker):
    worker("time.sleep(1.5)\nprint('true', flush=True)")
    assert judge(MathVerifier(1.0)) == 1.0


def test_what_ended_with_its_worker_is_asked_once_more(worker):
    worker(
        "if not (HERE / 'again').exists():\n"
        "    (HERE / 'again').touch()\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "print('true', flush=True)"
    )
    assert judge(MathVerifier()) == 1.0


def test_an_answer_that_always_ends_its_worker_is_unsolved(worker):
    worker("os.kill(os.getpid(), signal.SIGKILL)")
    assert judge(MathVerifier()) == 0.0


def test_a_stuck_worker_is_given_up(worker, monkeypatch):
    worker("time.sleep(600)")
    monkeypatch.setattr(math_room, "_COMPARE_WALL_S", 0.5)
    assert judge(MathVerifier()) == 0.0


def test_a_late_answer_costs_its_own_time_and_no_new_start():
    verify = MathVerifier(0.5)
    assert judge(verify, OTHER) == 0.0
    (process,) = verify._workers._free
    assert verify._ask_worker(ENDLESS, ENDLESS[2]) is False
    assert verify._workers._free == [process]
    assert judge(verify) == 1.0
    assert verify._workers._free == [process]


def children(verify: MathVerifier) -> list[int]:
    (process,) = verify._workers._free
    with open(f"/proc/{process.pid}/task/{process.pid}/children") as file:
        return [int(word) for word in file.read().split()]


def test_a_child_that_dies_at_rest_shifts_no_verdict():
    verify = MathVerifier(30.0)
    assert judge(verify, OTHER) == 0.0
    os.kill(children(verify)[0], signal.SIGKILL)
    answers = [SAME, OTHER, SAME, OTHER, SAME]
    assert [judge(verify, answer) for answer in answers] == [1, 0, 1, 0, 1]


def test_what_the_machine_kills_is_compared_by_another_child():
    verify = MathVerifier(30.0)
    assert judge(verify, OTHER) == 0.0
    (first,) = children(verify)
    results = []
    thread = threading.Thread(target=lambda: results.append(judge(verify)), daemon=True)
    os.kill(first, signal.SIGSTOP)  # so that it cannot answer before it is killed
    thread.start()
    time.sleep(0.2)
    os.kill(first, signal.SIGKILL)
    thread.join()
    assert results == [1.0]
    assert children(verify) != [first]


def test_a_machine_without_room_for_a_worker_is_one_line(monkeypatch):
    def too_many(*words, **settings):
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr("megatron_rl.rewards.worker_pool.subprocess.Popen", too_many)
    with pytest.raises(RunFailed) as told:
        judge(MathVerifier())
    assert str(told.value) == (
        "math_worker could not be started (Too many open files); expected room for temporary "
        "files, and processes and open files left; mend it and run the same command to continue"
    )
