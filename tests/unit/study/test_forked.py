"""Copies of a process in place of new ones: what a copy sees and how it ends."""

import json
import os
import signal
import sys
import textwrap
import time
from pathlib import Path

import psutil
import pytest

from megatron_rl.study.child import Child
from megatron_rl.study.forked import ForkServer
from megatron_rl.study.plan import make_plan
from megatron_rl.study.schema import read_study
from tests.support.stand_in_study import ROOT, lay_out

#: A server; its first argument after the program is what a copy does.
SERVER = """\
import json, os, signal, sys, threading, time
sys.path.insert(0, {root!r})
from megatron_rl.study.fork_server import serve

def prepare():
    {prepare}
    return {gpu}

def main(words):
    if words[0] == "tell":
        about = {{"pid": os.getpid(), "parent": os.getppid(), "session": os.getsid(0)}}
        about["files"] = sorted(os.readlink(f"/proc/self/fd/{{n}}") for n in (0, 1, 2))
        about["open"] = len(os.listdir("/proc/self/fd"))
        print(json.dumps({{**about, "environment": dict(os.environ), "words": words}}))
        return 7
    if words[0] == "fail":
        raise ValueError("odd")
    print("sleeps", flush=True)
    if words[0] == "catch":
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(5))
        print("catches", flush=True)
    time.sleep(60)

serve(int(sys.argv[1]), prepare, main)
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def notes():
    return []


def server(folder, notes, prepare="pass", gpu=False):
    text = SERVER.format(root=str(ROOT), prepare=prepare, gpu=gpu)
    (folder / "server.py").write_text(textwrap.dedent(text))
    program = [sys.executable, str(folder / "server.py")]
    return ForkServer(notes.append, [sys.executable, "run"], program)


def planned(folder, more=""):
    lay_out(folder, f"arms: {{a: {{}}}}\nseeds: 1\n{more}")
    (run,) = make_plan(read_study(Path("study.yaml"))).runs
    return run


def child(run, forks, *words, **more):
    return Child(run, 0, lambda run: [sys.executable, "run", *words], forks=forks, **more)


def wait_for(text, of, limit_s=60.0):
    deadline = time.monotonic() + limit_s
    while text not in of.log.read_text():
        assert time.monotonic() < deadline and of.ended() is None, of.log.read_text()
        time.sleep(0.005)


def test_a_copy_is_a_child_of_the_study_with_its_own_session_environment_and_log(
    folder, notes, monkeypatch
):
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("OF_THE_STUDY", "yes")
    run = planned(folder, "threads: 2\n")
    with server(folder, notes) as forks:
        own = child(run, forks, "tell", "and more")
        assert own._process.wait() == 7 and own.ended() == 7
    header, line = own.log.read_text().splitlines()
    assert header == f"== {sys.executable} run tell and more"
    found = json.loads(line)
    assert found["parent"] == os.getpid() and found["pid"] == own._process.pid
    assert found["session"] == found["pid"]
    assert found["words"] == ["tell", "and more"]
    assert found["files"] == ["/dev/null", str(own.log.resolve()), str(own.log.resolve())]
    assert found["open"] == 4  # these and the folder that is read: no socket, no server's file
    environment = found["environment"]
    assert environment["OMP_NUM_THREADS"] == "2" and environment["OF_THE_STUDY"] == "yes"
    assert environment["PYTHONUNBUFFERED"] == "1" and "RANK" not in environment
    assert notes == []


def test_an_error_is_in_the_log_and_in_the_exit_code(folder, notes):
    with server(folder, notes) as forks:
        own = child(planned(folder), forks, "fail")
        assert own._process.wait() == 1
    assert own.log.read_text().splitlines()[-1] == "ValueError: odd"


def test_a_copy_outlives_the_server_and_hears_signals(folder, notes):
    run = planned(folder)
    with server(folder, notes) as forks:
        one, two = child(run, forks, "sleep"), child(run, forks, "sleep")
        three = child(run, forks, "catch")
        wait_for("catches", three)
    one.stop()
    assert one._process.wait() == -signal.SIGTERM
    three.stop()
    assert three._process.wait() == 5
    assert two.ended() is None
    two.kill()
    assert two.ended() == -signal.SIGKILL
    two.stop()  # nothing happens: it has ended


def test_a_server_that_dies_is_noted_and_the_next_run_is_fresh(folder, notes):
    run = planned(folder)
    with server(folder, notes) as forks:
        own = child(run, forks, "sleep")
        wait_for("sleeps", own)
        forks._process.kill()
        forks._process.wait()
        with open(folder / "log", "ab") as log:
            command = [sys.executable, "run", "sleep"]
            assert forks.start(run, command, dict(os.environ), log) is None
            assert forks.start(run, command, dict(os.environ), log) is None
        assert own.ended() is None
        own.kill()
    assert len(notes) == 1 and notes[0].startswith("each run starts anew and imports for itself")


REFUSED = {
    "threads": (
        "threading.Thread(target=time.sleep, args=(60,), daemon=True, name='x').start()",
        "threads: x",
    ),
    "its end": ("sys.exit(3)", "the process that had imported for them has ended"),
}


@pytest.mark.parametrize("prepare, why", REFUSED.values(), ids=REFUSED)
def test_where_copies_are_not_possible_runs_are_fresh(folder, notes, prepare, why):
    run = planned(folder)
    program = [sys.executable, "-c", "import os; print('parent', os.getppid())"]
    with server(folder, notes, prepare) as forks:
        forks._command = program[:1]
        own = Child(run, 0, lambda run: program, forks=forks)
        assert own._process.wait(60) == 0
    assert own.log.read_text().splitlines()[-1] == f"parent {os.getpid()}"
    assert len(notes) == 1 and why in notes[0]


@pytest.mark.parametrize(
    "kind, gpu, words, copied",
    [
        ("cpu", True, ["run"], True),
        ("auto", False, ["run"], True),
        ("auto", True, ["run"], False),
        ("cuda", True, ["run"], False),
        ("cpu", False, ["torchrun", "run"], False),
    ],
)
def test_copies_are_for_runs_of_one_process_on_a_cpu(folder, notes, kind, gpu, words, copied):
    run = planned(folder, f"overrides: {{device.kind: {kind}}}\n")
    with server(folder, notes, gpu=gpu) as forks, open(folder / "log", "ab") as log:
        found = forks.start(run, [sys.executable, *words, "tell"], dict(os.environ), log)
        assert (found is not None) == copied
        assert found is None or found.wait() == 7
        program = [sys.executable, "-c", "pass"]
        forks._command = program[:1]
        own = Child(run, 0, lambda run: program, gpus=[0], forks=forks)
        assert own._process.wait(60) == 0  # it has a device of its own, so it is fresh
    assert notes == []


def test_a_run_that_is_no_copy_starts_no_server(folder, notes):
    with server(folder, notes) as forks, open(folder / "log", "ab") as log:
        assert forks.start(planned(folder), [sys.executable, "other"], {}, log) is None
        assert forks._process is None


def test_the_server_ends_with_the_study(folder, notes):
    with server(folder, notes) as forks:
        own = child(planned(folder), forks, "tell")
        own._process.wait()
        pid = forks._process.pid
        assert psutil.Process(pid).ppid() == os.getpid()
    assert not psutil.pid_exists(pid)
