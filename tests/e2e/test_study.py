"""A study of real runs: two arms, two seeds and a warm-up, killed twice at a random moment; it ends
like one that was not disturbed.
"""

import csv
import json
import os
import random
import time
from pathlib import Path

import pandas
import pytest

from megatron_rl.study.plan import make_plan
from megatron_rl.study.schema import read_study
from megatron_rl.study.state import state_of
from tests.support.recipe import make_recipe
from tests.support.runs import TIMEOUT_S, reproducible, run, started
from tests.support.warm import start_warm

STEPS = 3
STUDY = f"""\
study_dir: runs/study
base: rl.yaml
overrides:
  parallel: {{expert: 1, world_size: 1}}
  rollout.prompts_per_step: 4
  train.steps: {STEPS}
  evaluate: {{every: 0, samples: 0, problems: 4}}
  checkpoint.every: 1
prepare:
  sft:
    config: sft.yaml
    overrides:
      parallel: {{expert: 1, world_size: 1}}
      train: {{steps: 2, batch_size: 8}}
      evaluate: {{samples: 0, problems: 4}}
start_from: sft
arms:
  gmpo: {{algorithm.name: gmpo}}
  rspo: {{algorithm.name: rspo}}
seeds: 2
compare_to: gmpo
at_once: 2
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = make_recipe(tmp_path_factory.mktemp("study"))
    (folder / "study.yaml").write_text(STUDY)
    return folder


@pytest.fixture(scope="module")
def study(folder):
    """The study's last output, after kills: while it or its warm-up starts, and among the arms."""
    moments = random.Random(11)
    with started("study", "study.yaml", cwd=folder) as process:
        time.sleep(moments.uniform(0.0, 8.0))
        process.kill_command()
    with started("study", "study.yaml", cwd=folder) as process:
        saved = "runs/*/*/checkpoints/step_1"
        process.wait_until(lambda: any((folder / "runs/study").glob(saved)))
        time.sleep(moments.uniform(0.0, 1.0))
        process.kill_command()
    return run("study", "study.yaml", cwd=folder)


@pytest.fixture
def runs(folder, study, monkeypatch):
    monkeypatch.chdir(folder)
    assert study.code == 0, study.out + study.err
    return make_plan(read_study(Path("study.yaml"))).runs


def test_a_killed_study_ends_with_every_run_done(runs, study):
    assert [(run.name, state_of(run).kind) for run in runs] == [
        *(("prepare sft", "done"), ("gmpo seed 1", "done"), ("rspo seed 1", "done")),
        *(("gmpo seed 2", "done"), ("rspo seed 2", "done")),
    ]
    for planned in runs[1:]:
        steps = [record["step"] for record in reproducible(planned.run_dir)]
        assert steps == list(range(STEPS + 1))
    assert study.out.splitlines()[-1] == "runs/study/study.html"


def test_a_run_of_it_is_the_run_that_its_configuration_gives(runs, folder):
    """The command line in a new process, given the file that the study left, without a study or a
    kill: the study's run, a copy of a process that had imported everything, has the same numbers.
    """
    planned = runs[2]
    again = run(
        *("train", str(planned.run_dir / "planned.yaml"), "--run_dir", "runs/alone"), cwd=folder
    )
    assert again.code == 0, again.err
    assert reproducible(folder / "runs/alone") == reproducible(planned.run_dir)


def test_nothing_is_run_twice(runs, folder):
    before = [(run.run_dir / "log.txt").read_text() for run in runs]
    done = run("study", "study.yaml", cwd=folder)
    assert done.code == 0 and "5 of 5 runs done" in done.out
    assert [(run.run_dir / "log.txt").read_text() for run in runs] == before


def test_the_results_hold_every_runs_numbers(runs):
    frame = pandas.read_csv("runs/study/results.csv")
    for planned in runs[1:]:
        own = frame[(frame.arm == planned.arm) & (frame.seed == planned.seed)]
        lines = (planned.run_dir / "metrics.jsonl").read_text().splitlines()
        for record in map(json.loads, lines):
            found = own[own.step == record["step"]].set_index("metric").value
            for name in ("reward/solved", "grad_norm", "eval/pass@1"):
                assert found.get(name) == record.get(name)
    with open("runs/study/summary.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    solved = [row for row in rows if (row["metric"], row["number"]) == ("reward/solved", "final")]
    assert [(row["arm"], row["runs"], row["pairs"]) for row in solved] == [
        *(("gmpo", "2", "0"), ("rspo", "2", "2")),
    ]


def test_the_gradients_of_its_arms(runs, folder, tmp_path):
    """The example's script, from the warmed-up weights: each arm on the same mini-batches."""
    out = tmp_path / "gradients.json"
    words = ["study.yaml", "--drift", "2", "0", "--mini-batches", "4"]
    words += ["--base", "gmpo", "--out", str(out)]
    with open(tmp_path / "log", "w") as log, open(os.devnull) as nothing:
        process = start_warm(
            "examples.router_shift_study.gradients:main",
            [words],
            cwd=folder,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            files=[nothing.fileno(), log.fileno(), log.fileno()],
        )
        code = process.wait(TIMEOUT_S)
        process.kill()
    assert code == 0, (tmp_path / "log").read_text()
    found, undrifted = json.loads(out.read_text())
    assert undrifted["arms"]["rspo"]["trace"] == undrifted["arms"]["gmpo"]["trace"]  # gamma is 1
    assert found["weights"].startswith(str(runs[0].run_dir))
    assert found["drift"]["steps"] == 2 and found["arms"].keys() == {"gmpo", "rspo"}
    for arm in found["arms"].values():
        assert arm["mini_batches"] == 4
        n, trace, signal = 4, arm["trace"], arm["signal"]
        assert arm["mean_square"] == pytest.approx(signal + trace)  # E|g|^2 = |E g|^2 + tr Cov
        assert arm["square_of_mean"] == pytest.approx(signal + trace / n)
        assert trace > 0
    shifted = [
        name for name in found["arms"] if "router/raw_gamma_mean" in found["arms"][name]["metrics"]
    ]
    assert shifted == ["rspo"]
    assert -1 <= found["cosines"]["gmpo"]["rspo"] <= 1 + 1e-9
    lines = (tmp_path / "log").read_text().splitlines()
    assert [line.split()[0] for line in lines[-3:-1]] == ["gmpo", "rspo"]  # of 0 steps
