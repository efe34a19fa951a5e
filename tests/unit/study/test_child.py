"""The process of a run: its command, what it sees, and which line of its log is its error."""

import json
from pathlib import Path

import pytest

from megatron_rl.study.child import Child, command_of
from megatron_rl.study.plan import make_plan
from megatron_rl.study.runner import slots_of
from megatron_rl.study.schema import read_study
from megatron_rl.study.state import PLANNED_FILE, last_error, last_records
from tests.support.stand_in_study import lay_out


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def plan(folder, more=""):
    lay_out(folder, f"arms: {{a: {{}}}}\nseeds: 1\n{more}")
    return make_plan(read_study(Path("study.yaml")))


def test_one_rank_is_the_command_line_and_several_are_torchruns(folder):
    (run,) = plan(folder).runs
    words = ["megatron_rl", "train", str(run.run_dir / PLANNED_FILE)]
    assert command_of(run)[1:] == ["-m", *words]
    (run,) = plan(folder, "overrides: {parallel: {expert: 2}}\n").runs
    words[-1] = str(run.run_dir / PLANNED_FILE)
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    assert command_of(run)[1:] == [*launch, "-m", *words]


def test_the_file_of_a_run_gives_its_configuration_back(folder):
    from megatron_rl.config.load import load_config
    from megatron_rl.study.state import lay_out as lay_out_run

    (run,) = plan(folder, "overrides: {optimizer.lr: 0.125, checkpoint.every: 3}\n").runs
    lay_out_run(run)
    assert load_config(run.run_dir / PLANNED_FILE) == run.config


def test_a_child_sees_its_threads_and_gpus_and_no_launch_around_it(folder, monkeypatch):
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("MASTER_ADDR", "node")
    (run,) = plan(folder, "threads: 2\n").runs
    show = "import json, os; print(json.dumps(dict(os.environ)))"
    child = Child(run, 0, lambda run: [command_of(run)[0], "-c", show], gpus=[4, 5])
    assert child._process.wait(60) == 0
    found = json.loads(child.log.read_text().splitlines()[-1])
    assert found["OMP_NUM_THREADS"] == "2" and found["CUDA_VISIBLE_DEVICES"] == "4,5"
    assert found["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] == "600"
    assert not {"RANK", "MASTER_ADDR"} & found.keys()


def test_as_many_at_once_as_there_are_cores_or_gpus_for(folder, monkeypatch):
    monkeypatch.setattr("megatron_rl.study.runner.usable_cores", lambda: 12)
    assert slots_of(plan(folder)) == 12
    assert slots_of(plan(folder, "threads: 5\n")) == 2
    assert slots_of(plan(folder, "threads: 100\n")) == 1
    assert slots_of(plan(folder, "overrides: {parallel: {expert: 2}}\n")) == 6
    assert slots_of(plan(folder, "overrides: {parallel: {expert: 2}}\ngpus: 8\n")) == 4
    assert slots_of(plan(folder, "at_once: 3\n")) == 3
    assert slots_of(plan(folder, "at_once: 3\n"), at_once=5) == 5


LOGS = {
    "the program's line": (
        b"step 1\nmegatron-rl: error: rank 1: it broke; expected it whole\nafter\n",
        *(1, "rank 1: it broke; expected it whole"),
    ),
    "a traceback": (
        b'Traceback:\n  File "x"\nValueError: odd: 3\n\nshutting down\n',
        1,
        "ValueError: odd: 3",
    ),
    "a last line": (b"something\nodd happened\n\n", 1, "odd happened"),
    "nothing": (b"", 3, "exit code 3"),
    "a signal": (b"megatron-rl: error: an earlier one\n", -9, "ended by signal 9"),
}


@pytest.mark.parametrize("log, code, error", LOGS.values(), ids=LOGS)
def test_the_error_of_a_log(tmp_path, log, code, error):
    path = tmp_path / "log.txt"
    path.write_bytes(b"megatron-rl: error: of the attempt before\n" + log)
    start = path.stat().st_size - len(log)
    assert last_error(path, code, start) == error


def test_the_last_records_of_a_file_that_is_long_torn_or_missing(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert last_records(path) == []
    lines = [json.dumps({"step": step, "loss": 0.5, "pad": "x" * 1000}) for step in range(600)]
    path.write_text("\n".join(lines) + '\n{"step": 600, "lo')
    found = [record["step"] for record in last_records(path)]
    assert found == list(range(found[0], 600)) and 250 < len(found) < 270
    path.write_text('{"step": 3, "router/shift_mean": 0.5}\n')  # a name of an older version
    assert last_records(path) == [{"step": 3, "router/raw_gamma_mean": 0.5}]
