"""Runs side by side, with stand-ins in their place: kills, signals, failures, a budget."""

import contextlib
import io
import json
import os
import random
import signal
import subprocess
import sys
import time

import psutil
import pytest

from megatron_rl.study.plan import make_plan
from megatron_rl.study.schema import read_study
from megatron_rl.study.state import DONE_FILE, state_of
from tests.support import stand_in_study
from tests.support.stand_in_study import ROOT, journal, lay_out, overlaps

SCRIPT = str(ROOT / "tests/support/stand_in_study.py")
LIMIT_S = 120.0
TWO_ARMS = "arms: {a: {optimizer.lr: 0.1}, b: {optimizer.lr: 0.2}}\nseeds: 2\nat_once: 2\n"
#: Runs that are copies of one process, and runs that start anew.
FORK = ["fork: true\n", "fork: false\n"]
ERROR = "the disk is odd; expected an even one"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def start(folder, *words):
    return subprocess.Popen(
        [sys.executable, SCRIPT, "study.yaml", *words],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process):
    out, _ = process.communicate(timeout=LIMIT_S)
    return process.returncode, out


def run(folder, *words):
    """The study in this process: its exit code, and what it shows."""
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown), contextlib.redirect_stderr(shown):
        code = stand_in_study.study(["study.yaml", *words])
    return code, shown.getvalue()


def plan(quick=False):
    return make_plan(read_study(stand_in_study.Path("study.yaml")), quick)


def kinds():
    return {run.name: state_of(run).kind for run in plan().runs}


def metrics(run):
    return [json.loads(line) for line in (run.run_dir / "metrics.jsonl").read_text().splitlines()]


def wait_until(happened, process=None):
    deadline = time.monotonic() + LIMIT_S
    while not happened():
        assert time.monotonic() < deadline
        assert process is None or process.poll() is None, process.communicate()[0]
        time.sleep(0.005)


def steps_of(folder, name):
    """The steps noted of a run, in order; the beginnings of processes left out."""
    (planned,) = [run for run in plan().runs if run.name == name]
    return [step for run, _, step in journal(folder) if run == str(planned.run_dir) and step > 0]


def test_every_arm_runs_with_every_seed_once(folder):
    lay_out(folder, TWO_ARMS)
    code, out = run(folder)
    assert code == 0, out
    assert set(kinds().items()) == {(f"{a} seed {s}", "done") for a in "ab" for s in (1, 2)}
    for name in kinds():
        assert steps_of(folder, name) == [1, 2, 3, 4, 5, 6]
    assert len({pid for _, pid, _ in journal(folder)}) == 4
    before = journal(folder)
    code, out = run(folder)
    assert code == 0 and "4 of 4 runs done" in out
    assert journal(folder) == before  # nothing was started again


def test_so_many_run_at_once(folder):
    lay_out(folder, "arms: {slow: {}}\nseeds: 5\nat_once: 2\noverrides: {train.steps: 3}\n")
    assert run(folder)[0] == 0
    alive, most = set(), 0
    last = {pid: index for index, (_, pid, _) in enumerate(journal(folder))}
    for index, (_, pid, _) in enumerate(journal(folder)):
        alive.add(pid)
        most = max(most, len(alive))
        if last[pid] == index:
            alive.remove(pid)
    assert most == 2


SLOW = [pytest.param(n, fork, marks=pytest.mark.slow) for n in (1, 2) for fork in FORK]


@pytest.mark.parametrize("seed, fork", [(0, FORK[0]), (0, FORK[1]), *SLOW])
def test_killed_at_any_moment_the_same_command_goes_on(folder, seed, fork):
    """Kills of the study, while it starts and while runs are at work: each run is whole, no step
    was written twice, and no two processes were at work in one run.
    """
    arms = TWO_ARMS.replace("seeds: 2", "seeds: 3")
    lay_out(folder, f"{arms}overrides: {{train.steps: 25}}\n{fork}")
    moments = random.Random(seed)
    for kill in range(6):
        process, before = start(folder), len(journal(folder))
        if kill % 2:
            wanted = before + moments.randrange(1, 20)
            wait_until(lambda: len(journal(folder)) >= wanted, process)  # noqa: B023
        else:
            time.sleep(moments.uniform(0.0, 1.5))
        process.kill()
        process.communicate()
    assert len(journal(folder)) < 6 * 25
    code, out = run(folder)
    assert code == 0, out
    assert set(kinds().values()) == {"done"}
    for planned in plan().runs:
        assert [record["step"] for record in metrics(planned)] == list(range(1, 26))
    for name in kinds():
        assert steps_of(folder, name) == list(range(1, 26))
    assert list(overlaps(journal(folder))) == []
    assert len({pid for _, pid, _ in journal(folder)}) > 6  # some were at work when it was killed


@pytest.mark.parametrize("fork", FORK)
def test_children_end_with_a_killed_study(folder, fork):
    runs = "arms: {slow: {}}\nseeds: 2\nat_once: 2\noverrides: {train.steps: 1000}\n"
    lay_out(folder, runs + fork)
    process = start(folder)
    wait_until(lambda: len({pid for _, pid, _ in journal(folder)}) == 2, process)
    others = {child.pid for child in psutil.Process(process.pid).children(recursive=True)}
    assert len(others) == (2 if "false" in fork else 3)  # with the process that is copied
    process.kill()
    process.communicate()
    children = {pid for _, pid, _ in journal(folder)} | others
    wait_until(lambda: not any(map(psutil.pid_exists, children)))
    assert set(kinds().values()) <= {"stopped", "waiting"}


@pytest.mark.parametrize("fork", FORK)
def test_a_signal_lets_the_runs_end_their_step(folder, fork):
    lay_out(folder, f"{TWO_ARMS}overrides: {{train.steps: 500}}\n{fork}")
    process = start(folder)
    wait_until(lambda: len(journal(folder)) > 10, process)
    process.send_signal(signal.SIGTERM)
    code, out = finish(process)
    assert code == 0 and "stopped; run the same command to continue" in out
    assert not any(psutil.pid_exists(pid) for _, pid, _ in journal(folder))
    assert sorted(kinds().values()) == ["stopped", "stopped", "waiting", "waiting"]
    assert not list(folder.rglob(DONE_FILE)) and not list(folder.rglob("run.lock"))


@pytest.mark.parametrize("fork", FORK)
def test_a_failure_is_named_and_the_others_go_on(folder, fork):
    arms = "arms: {fails: {optimizer.lr: 0.1}, b: {optimizer.lr: 0.2}}\nseeds: 2\n"
    lay_out(folder, arms + fork)
    code, out = run(folder)
    assert code == 1
    last = out.splitlines()[-1]
    assert last.startswith(
        f"megatron-rl: error: 2 runs failed: fails seed 1 ({ERROR}); fails seed 2 ({ERROR}); look"
    )
    assert kinds() == {
        "fails seed 1": "failed",
        "b seed 1": "done",
        "fails seed 2": "failed",
        "b seed 2": "done",
    }
    code, out = run(folder, "--status")
    assert code == 0 and out.count(ERROR) == 2


def test_a_failed_run_is_tried_again_by_the_same_command(folder):
    lay_out(folder, "arms: {fails_once: {}}\nseeds: 1\n")
    assert run(folder)[0] == 1
    assert run(folder)[0] == 0
    assert steps_of(folder, "fails_once seed 1") == [1, 2, 3, 4, 5, 6]
    assert kinds() == {"fails_once seed 1": "done"}


def test_a_run_whose_numbers_are_not_finite_has_ended(folder):
    lay_out(folder, "arms: {diverges: {}}\nseeds: 1\n")
    code, out = run(folder)
    assert code == 0, out
    assert kinds() == {"diverges seed 1": "not finite"}
    before = journal(folder)
    assert run(folder)[0] == 0
    assert journal(folder) == before


PREPARED = (
    "prepare: {warm: {config: base.yaml, overrides: {train.steps: 4}}}\n"
    "start_from: warm\narms: {a: {}}\nseeds: 2\n"
)


def test_prepared_runs_come_first_and_once(folder):
    lay_out(folder, PREPARED)
    assert run(folder)[0] == 0
    order = list(dict.fromkeys(run for run, _, _ in journal(folder)))
    warm, *arms = plan().runs
    assert order[0] == str(warm.run_dir) and set(order) == {str(r.run_dir) for r in plan().runs}
    assert {run.config.checkpoint.init_from for run in arms} == {warm.run_dir}
    assert steps_of(folder, "prepare warm") == [1, 2, 3, 4]
    names = [run for run, _, _ in journal(folder)]
    assert max(i for i, name in enumerate(names) if name == order[0]) < names.index(order[1])


def test_runs_without_the_weights_they_start_from_are_left_out(folder):
    lay_out(folder, PREPARED.replace("warm", "fails"))
    code, out = run(folder)
    assert code == 1
    assert f"1 run failed: prepare fails ({ERROR})" in out
    assert "2 lack the weights of prepare fails, which is failed" in out
    assert set(kinds().values()) == {"failed", "waiting"}


def test_no_run_starts_beyond_the_budget(folder):
    lay_out(folder, "arms: {a: {}}\nseeds: 5\nat_once: 1\nbudget: {runs: 2}\n")
    for _ in range(2):
        code, out = run(folder)
        assert code == 0 and "the budget is spent: 3 runs are not started" in out
        assert list(kinds().values()) == ["done", "done", *3 * ["waiting"]]


def test_the_budgets_hours_are_those_of_the_runs_own_clocks(folder):
    hours = 2.5 * 6 * stand_in_study.STEP_S / 3600  # of two and a half runs
    lay_out(folder, f"arms: {{a: {{}}}}\nseeds: 5\nat_once: 1\nbudget: {{hours: {hours}}}\n")
    assert run(folder)[0] == 0
    assert list(kinds().values()) == [*3 * ["done"], *2 * ["waiting"]]


def test_a_second_study_of_the_same_directory_is_refused(folder):
    lay_out(folder, "arms: {slow: {}}\nseeds: 1\noverrides: {train.steps: 100}\n")
    process = start(folder)
    try:
        wait_until(lambda: journal(folder), process)
        code, out = run(folder)
        assert code == 2 and f"study_dir out is in use by process {process.pid} on" in out
        code, out = run(folder, "--status")  # while it runs
        assert code == 0 and "slow     1  running" in out
        wait_until(lambda: len(journal(folder)) > 2, process)
        code, out = run(folder, "--report")
        assert code == 0 and "no run has ended yet" in out
        assert (folder / "out" / "study.html").exists()
    finally:
        process.kill()
        process.communicate()


def test_one_run_by_its_index(folder):
    lay_out(folder, TWO_ARMS)
    assert run(folder, "--only", "2")[0] == 0
    assert list(kinds().values()) == ["waiting", "waiting", "done", "waiting"]
    code, out = run(folder, "--only", "4")
    assert code == 2 and "--only is 4; expected the index of a run, below 4" in out


def test_quick_runs_are_fewer_shorter_and_elsewhere(folder):
    lay_out(folder, "arms: {a: {}}\nseeds: 5\nquick: {seeds: 2, steps: 0.34}\n")
    assert run(folder, "--quick")[0] == 0
    runs = plan(quick=True).runs
    assert [(run.seed, run.steps) for run in runs] == [(1, 2), (2, 2)]
    assert {run.run_dir.parents[2].as_posix() for run in runs} == {"out/quick"}
    assert {state_of(run).kind for run in runs} == {"done"}
    assert set(kinds().values()) == {"waiting"}  # the study itself has not begun
