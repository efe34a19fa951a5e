"""Calls in daemon threads: results, errors, and a call that never returns."""

import subprocess
import sys
import threading

import pytest

from megatron_rl.rollout.daemon_thread import in_daemon_thread
from tests.support.runs import ROOT


def test_a_result_and_the_name_of_the_thread_come_back():
    def named(number):
        return number, threading.current_thread().name, threading.current_thread().daemon

    assert in_daemon_thread(named, 3, name="judge").result(30.0) == (3, "judge", True)


@pytest.mark.parametrize("error", [ValueError("none"), SystemExit(3)])
def test_any_error_comes_back(error):
    def fail():
        raise error

    assert in_daemon_thread(fail, name="judge").exception(30.0) is error


def test_a_process_ends_without_a_call_that_never_returns():
    code = (
        "import threading\n"
        "from megatron_rl.rollout.daemon_thread import in_daemon_thread\n"
        "future = in_daemon_thread(threading.Event().wait, name='judge')\n"
        "print(future.cancel(), future.done())\n"
    )
    argv = [sys.executable, "-c", code]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout == "False False\n"
