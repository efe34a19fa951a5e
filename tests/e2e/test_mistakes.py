"""Users' mistakes: exit code 2, one line that names the thing, no traceback."""

import os
import shutil
import socket

import pytest

from megatron_rl.run.run_lock import RunLock
from tests.support.runs import run

ONE_RANK = ("--parallel.expert=1", "--parallel.world_size=1")

#: name -> (command, what the line says). One process each.
MISTAKES = {
    "key": (
        ["train", "rl.yaml", *ONE_RANK, "--algorithm.nam", "rspo"],
        "unknown key --algorithm.nam (did you mean algorithm.name?)",
    ),
    "ranks": (
        ["train", "rl.yaml"],
        "found 1 rank; the config's parallel section needs 2; start it with: torchrun",
    ),
    "missing file": (
        ["train", "rl.yaml", *ONE_RANK, "--data.train", "none.jsonl"],
        "data.train: none.jsonl does not exist; expected a path",
    ),
    "not JSON": (
        ["train", "rl.yaml", *ONE_RANK, "--data.train", "bad.jsonl"],
        "bad.jsonl, line 2: not JSON (",
    ),
    "not JSON in evaluation data": (
        ["sft", "sft.yaml", *ONE_RANK, "--data.eval", "bad.jsonl"],
        "bad.jsonl, line 2: not JSON (",
    ),
    "empty": (
        ["evaluate", "sft.yaml", *ONE_RANK, "--data.eval", "empty.jsonl"],
        "empty.jsonl: empty data set; expected one JSON object a line",
    ),
    "vocabulary": (
        ["train", "rl.yaml", *ONE_RANK, "--model.vocab_size", "16"],
        "the tokenizer has 19 ids, model.vocab_size is 16: no rows for '9' (16), '-' (17), "
        "'0' (18); expected at least",
    ),
    "setting": (
        ["train", "rl.yaml", *ONE_RANK, "--algorithm.settings.clip_lo", "0.2"],
        "algorithm.settings.clip_lo is no setting of the loss rspo (did you mean clip_low?); ",
    ),
    "value of a setting": (
        ["train", "rl.yaml", *ONE_RANK, "--algorithm.settings.clip_low", "-0.2"],
        "algorithm.settings.clip_low is -0.2; expected a number, above 0",
    ),
    "loss without its router shift": (
        ["train", "rl.yaml", *ONE_RANK, "--algorithm.router_shift.enabled", "false"],
        "algorithm.router_shift.enabled is false with algorithm.name rspo; expected true or null",
    ),
    "architecture": (
        ["evaluate", "sft.yaml", *ONE_RANK, "--model.hidden_size", "64"],
        "runs/sft/checkpoints/step_60 is of a model with hidden_size 32",
    ),
    "no checkpoint": (
        ["generate", "sft.yaml", *ONE_RANK, "--run_dir", "runs/none", "--prompt", "1 2=3:"],
        "runs/none does not exist; expected a run directory",
    ),
    "a run directory in use": (
        ["train", "rl.yaml", *ONE_RANK, "--run_dir", "runs/held"],
        f"run_dir runs/held is in use by process {os.getpid()} on {socket.gethostname()} since ",
    ),
    "a run directory that cannot be written": (
        ["sft", "sft.yaml", *ONE_RANK, "--run_dir", "empty.jsonl/run"],
        "run_dir empty.jsonl/run cannot be written (Not a directory: empty.jsonl/run); expected ",
    ),
    "a server elsewhere without its key": (
        ["train", "rl.yaml", *ONE_RANK, "--run_dir=runs/keyless", "--rollout.engine=vllm"]
        + ["--rollout.servers.urls=[http://host.invalid:8000]"],
        "rollout.servers.urls names http://host.invalid:8000, and MEGATRON_RL_SERVER_KEY is not ",
    ),
    "prompt": (
        ["generate", "sft.yaml", *ONE_RANK, "--prompt", "1 " * 40],
        "has 81 tokens; expected 1 to 52",
    ),
}


@pytest.fixture(scope="module")
def refusals(folder, sft_run):
    """All mistakes, each in a process by itself."""
    problem = '{"prompt": "1 2=3:", "numbers": [1, 2], "target": 3}'
    (folder / "bad.jsonl").write_text(f'{problem}\n{{"prompt": \n')
    (folder / "empty.jsonl").write_text("\n")
    lock = RunLock(folder / "runs" / "held")
    lock.acquire()
    try:
        return {name: run(*words, cwd=folder, warm=True) for name, (words, _) in MISTAKES.items()}
    finally:
        lock.release()


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_and_exit_code_2(refusals, name):
    done, expected = refusals[name], MISTAKES[name][1]
    assert done.code == 2, done.err
    assert done.err.startswith("megatron-rl: error: ") and done.err.count("\n") == 1, done.err
    assert expected in done.err
    assert done.out == ""


def assert_refused_once(done, expected):
    """The program says one line, of one rank."""
    assert len(done.errors) == 1 and expected in done.errors[0], done.err
    assert "/megatron_rl/" not in done.err, done.err  # no file of ours in a traceback


def test_under_torchrun_a_wrong_key_is_said_once(folder):
    """It ends with 1 itself, and says the exit code of the ranks."""
    done = run("train", "rl.yaml", "--algorithm.nam", "rspo", cwd=folder, ranks=2)
    assert_refused_once(done, "unknown key --algorithm.nam (did you mean algorithm.name?)")
    assert done.code == 1 and "exitcode  : 2 " in done.err


def test_a_run_is_not_continued_with_another_model(folder, rl_run):
    before = sorted((folder / "runs" / "rl").rglob("*"))
    done = run("train", "rl.yaml", "--model.hidden_size=64", cwd=folder, ranks=2, warm=True)
    assert done.ranks == (2, 2)
    assert_refused_once(done, "step_8 is of a model with hidden_size 32")
    assert "the configuration's model has hidden_size 64" in done.errors[0]
    assert sorted((folder / "runs" / "rl").rglob("*")) == before


def test_a_mistake_that_only_rank_0_can_see_ends_all_ranks(folder, rl_run):
    shutil.copytree(folder / "runs" / "rl", folder / "runs" / "damaged")
    metrics = folder / "runs" / "damaged" / "metrics.jsonl"
    metrics.write_text("what is this\n" + metrics.read_text())
    words = ["--run_dir", "runs/damaged", "--train.steps", "9"]
    done = run("train", "rl.yaml", *words, cwd=folder, ranks=2, warm=True)
    assert done.ranks == (2, 2)
    assert_refused_once(done, "metrics.jsonl line 1 holds 'what is this'; expected a JSON object")
