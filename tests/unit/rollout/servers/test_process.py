"""A run's own servers start, and end with the run, even if it is killed."""

import os
import signal
import subprocess
import sys
import textwrap

import psutil
import pytest

from megatron_rl.errors import RunFailed, Stopped
from megatron_rl.rollout.servers import process as server_process
from megatron_rl.rollout.servers.process import ServerProcess
from tests.support.fake_server import wait_for
from tests.support.runs import ROOT

#: A server with /health, and with a child process that would outlive it.
SERVER = textwrap.dedent("""\
    import http.server, subprocess, sys

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()

    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    print("child", child.pid, flush=True)
    http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
    """)


@pytest.fixture
def process(tmp_path):
    process = ServerProcess("127.0.0.1", tmp_path / "logs" / "server.log")
    yield process
    process.stop()


def command(process, code=SERVER):
    return [sys.executable, "-c", code, str(process.port)]


def processes_of(pid):
    parent = psutil.Process(pid)
    return [parent, *parent.children(recursive=True)]


def gone(processes):
    return lambda: not any(p.is_running() and p.status() != "zombie" for p in processes)


def test_it_serves_and_stops_with_all_it_started(process):
    assert not process.is_running and process.pid is None
    process.start(command(process), {})
    process.wait_until_ready(120.0)
    assert process.is_running
    started = processes_of(process.pid)
    assert len(started) == 3  # supervisor, server, its child
    process.stop()
    wait_for(gone(started))
    assert not process.is_running
    process.stop()


def test_its_environment_and_output(process, tmp_path):
    greeting = "print('hello', os.environ['GREETED'], os.environ['MEGATRON_RL_SERVER_KEY'] == KEY)"
    code = f"import os; KEY = {process.key!r}; {greeting}\n" + SERVER
    process.start(command(process, code), {"GREETED": "you"})
    process.wait_until_ready(120.0)
    log = tmp_path / "logs" / "server.log"
    assert log.read_text().startswith("hello you True\nchild ")
    assert log.stat().st_mode & 0o777 == 0o600


def test_a_server_that_cannot_be_ended_is_given_up(process, monkeypatch):
    """Signals do nothing, as with a process that hangs in a driver."""
    monkeypatch.setattr(server_process, "GRACE_S", 0.2)
    monkeypatch.setattr(server_process, "KILLED_S", 0.2)
    process.start([sys.executable, "-c", "import time; time.sleep(600)"], {})
    started, signals = processes_of(process.pid), []
    with monkeypatch.context() as deaf:
        deaf.setattr(os, "killpg", lambda group, number: signals.append(number))
        process.stop()
    assert signals == [signal.SIGTERM, signal.SIGKILL] and not process.is_running
    os.killpg(started[0].pid, signal.SIGKILL)
    wait_for(gone(started))


def test_the_end_of_a_log_is_read_and_not_all_of_it(process, tmp_path):
    log = tmp_path / "logs" / "server.log"
    log.parent.mkdir()
    with open(log, "wb") as file:
        file.truncate(1 << 33)
        file.seek(0, os.SEEK_END)
        file.write(b"\nMemoryError: \x1b[31mno memory\xff\n")
    assert process._last_words() == "MemoryError: ?[31mno memory\ufffd"


def test_one_that_ends_says_why(process):
    process.start(command(process, "raise ValueError('no such model')"), {})
    with pytest.raises(RunFailed) as failure:
        process.wait_until_ready(120.0)
    text = str(failure.value)
    assert text.startswith(f"the rollout server at {process.url} ended within 120 s (")
    assert "ValueError: no such model" in text and text.endswith("logs/server.log")


def test_one_that_never_answers_is_stopped(process):
    process.start(command(process, "import time; time.sleep(600)"), {})
    started = processes_of(process.pid)
    with pytest.raises(RunFailed, match="gave no sign of life within 1 s .nothing in its log."):
        process.wait_until_ready(1.0)
    wait_for(gone(started))


def test_a_stop_is_heard_while_one_starts(process):
    process.start(command(process, "import time; time.sleep(600)"), {})
    with pytest.raises(Stopped):
        process.wait_until_ready(600.0, stop=lambda: True)
    process.stop()


def test_a_killed_server_can_be_started_again(process):
    process.start(command(process), {})
    process.wait_until_ready(120.0)
    os.kill(processes_of(process.pid)[1].pid, signal.SIGKILL)
    wait_for(lambda: not process.is_running)
    process.stop()
    process.start(command(process), {})
    process.wait_until_ready(120.0)


def test_it_ends_with_a_run_that_is_killed(tmp_path):
    run = textwrap.dedent(f"""\
        import sys, time
        from pathlib import Path
        from megatron_rl.rollout.servers.process import ServerProcess
        process = ServerProcess("127.0.0.1", Path({str(tmp_path / "server.log")!r}))
        process.start([sys.executable, "-c", {SERVER!r}, str(process.port)], {{}})
        process.wait_until_ready(120.0)
        print(process.pid, flush=True)
        time.sleep(600)
        """)
    with subprocess.Popen(
        [sys.executable, "-c", run], stdout=subprocess.PIPE, text=True, cwd=ROOT
    ) as killed:
        started = processes_of(int(killed.stdout.readline()))
        killed.kill()
    assert len(started) == 3
    wait_for(gone(started))
