"""Ranks that are really stopped: each a process of its own, which only reduces a number."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from datetime import timedelta

import pytest
from torch.distributed import PrefixStore, TCPStore

from megatron_rl.device.heartbeat import SIGNS_IN_LIMIT, Heartbeat
from megatron_rl.device.launch import Launch
from megatron_rl.errors import UserError
from tests.support import beating
from tests.support.nodes import environment, has_ipv6, wait_for

#: Silence after which the ranks of these tests are named.
LIMIT_S = 1.0


#: The place where ranks meet, in a process of its own, as torchrun's is in a run.
STORE = """
import time
from torch.distributed import PrefixStore, TCPStore
store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
print(store.port, flush=True)
time.sleep(600)
"""


@pytest.fixture
def started(tmp_path):
    """Starts a process with words, environment and log; none outlives the test."""
    with contextlib.ExitStack() as stack:

        def start(words, env, log):
            file = stack.enter_context(open(log, "w"))
            process = subprocess.Popen([sys.executable, *words], env=env, stdout=file, stderr=file)
            stack.callback(process.wait)
            stack.callback(process.kill)
            return process

        yield start


def test_what_is_stopped_is_named_and_goes_on_when_it_is_resumed(tmp_path, started):
    """Of two ranks on a node each in its turn, then the store; meanwhile the others wait."""
    file, logs = tmp_path / "alive", [tmp_path / f"rank_{rank}.log" for rank in range(2)]
    server = started(["-c", STORE], environment(), tmp_path / "store.log")
    wait_for("\n", tmp_path / "store.log")
    port = int((tmp_path / "store.log").read_text())
    host = "[::1]" if has_ipv6() else "127.0.0.1"
    place = {"MASTER_ADDR": host, "MASTER_PORT": port, "TORCHELASTIC_USE_AGENT_STORE": True}
    size = {"WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
    words = [beating.__file__, str(LIMIT_S), str(tmp_path)]
    ranks = [
        started(words, environment(RANK=rank, LOCAL_RANK=rank, **size, **place), log)
        for rank, log in enumerate(logs)
    ]
    signs = PrefixStore("megatron_rl/heartbeat", TCPStore("127.0.0.1", port, is_master=False))
    signs.wait(["0", "1"], timedelta(seconds=120))

    for rank, log in ((1, logs[0]), (0, logs[1])):
        with stopped(ranks[rank]):
            name = f"rank {rank} (process {ranks[rank].pid} on {socket.gethostname()})"
            wait_for(f"megatron-rl: warning: {name} has given no sign of life for 1 s", log, 60.0)
            assert "(kill -CONT resumes it)" in log.read_text()
            assert "has waited 600 s (device.timeout_s)" in log.read_text()
            wait_until_still(file)  # rank 0 lives, and does not touch it
        wait_for(f"warning: rank {rank} answers now", log, 60.0)
        wait_until_alive(file)
    with stopped(server):
        for log in logs:
            wait_for(f"no answer from {host}:{port}, where the ranks meet, for 1 s", log, 60.0)
    for log in logs:
        wait_for("warning: the machine of rank 0 answers now", log, 60.0)

    (tmp_path / "end").touch()
    for process, log in zip(ranks, logs):
        assert process.wait(60.0) == 0, log.read_text()
        assert "steps " in log.read_text() and "Traceback" not in log.read_text()


@contextlib.contextmanager
def stopped(process):
    """A process that is stopped meanwhile."""
    os.kill(process.pid, signal.SIGSTOP)
    yield
    os.kill(process.pid, signal.SIGCONT)


def wait_until_still(file):
    """Until the file has not been touched for a while."""
    began, last = time.monotonic(), None
    while last != (last := file.stat().st_mtime_ns):
        assert time.monotonic() - began < 60.0
        time.sleep(4 * LIMIT_S / SIGNS_IN_LIMIT)


def wait_until_alive(file):
    """Until the file is touched."""
    before = file.stat().st_mtime_ns if file.exists() else 0
    began = time.monotonic()
    while not file.exists() or file.stat().st_mtime_ns == before:
        assert time.monotonic() - began < 120.0
        time.sleep(0.02)


def test_one_process_alone_touches_its_file_and_ends_its_thread(tmp_path):
    file, before = tmp_path / "alive", threading.active_count()
    with Heartbeat(Launch(0, 1, 0, 1, launched=False), 1.0, 600.0, file):
        wait_until_alive(file)
        wait_until_alive(file)
    assert threading.active_count() == before


def test_a_file_that_cannot_be_written_is_refused(tmp_path):
    file = tmp_path / "none" / "alive"
    with pytest.raises(UserError, match=f"device.heartbeat_file {file} cannot be written"):
        with Heartbeat(Launch(0, 1, 0, 1, launched=False), 1.0, 600.0, file):
            pass
