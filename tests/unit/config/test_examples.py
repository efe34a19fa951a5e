"""Every configuration in examples/ is one that `check` accepts, with what its README says."""

import re
import shutil
from pathlib import Path

import pytest

from megatron_rl.cli import check_rows
from megatron_rl.config.checks import check_config
from megatron_rl.config.load import load_config
from megatron_rl.study.plan import make_plan
from megatron_rl.study.schema import read_study
from tests.support.runs import ROOT

#: The model each recipe starts from is not there: its preset has the same config.json.
RECIPES = {
    "qwen3_30b_a3b_math": ("qwen3_30b_a3b", [8, 32]),
    "mixtral_8x7b_math": ("mixtral_8x7b", [16, 32]),
    "moonlight_16b_a3b_math": ("moonlight_16b_a3b", [8]),
}


def recipe(name, ranks):
    words = ["--model.hf_path", "null", "--model.preset", RECIPES[name][0]]
    words += ["--data.tokenizer.path", "tokenizer", "--parallel.world_size", str(ranks)]
    return load_config(ROOT / "examples" / name / "rspo.yaml", words)


def test_all_configurations_are_tried():
    found = {path.parent.name for path in ROOT.glob("examples/*/*.yaml")}
    assert found == {*RECIPES, "countdown", "router_shift_study", "extend"}
    # the last is run: e2e/test_extend.py


@pytest.mark.parametrize("name", ["rspo", "sft"])
def test_the_countdown_example_is_valid(name):
    config = load_config(ROOT / "examples" / "countdown" / f"{name}.yaml", [])
    check_config(config, 2, {"rspo": "train", "sft": "sft"}[name], files=False)


@pytest.mark.parametrize("quick, seeds, steps", [(False, 3, (120, 100)), (True, 2, (4, 3))])
def test_the_study_is_valid(tmp_path, monkeypatch, quick, seeds, steps):
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    data = tmp_path / "examples" / "countdown" / "data"
    data.mkdir(exist_ok=True)
    for name in ("tokenizer.model", "sft.jsonl", "train.jsonl", "eval.jsonl"):
        (data / name).touch()
    monkeypatch.chdir(tmp_path)
    plan = make_plan(read_study(Path("examples/router_shift_study/study.yaml")), quick)
    assert [run.name for run in plan.runs[:4]] == [
        *("prepare sft", "gmpo seed 1", "rspo seed 1", "grpo seed 1"),
    ]
    assert (len(plan.seeds), {run.ranks for run in plan.runs}) == (seeds, {1})
    assert (plan.runs[0].steps, plan.runs[1].steps) == steps
    assert {run.config.checkpoint.init_from for run in plan.of_arms()} == {plan.runs[0].run_dir}


@pytest.mark.parametrize("name, ranks", [(n, r) for n, (_, many) in RECIPES.items() for r in many])
def test_recipes_are_valid_and_need_the_memory_that_is_said(name, ranks):
    config = recipe(name, ranks)
    check_config(config, ranks, "train", files=False)
    rows = dict(check_rows(config))
    total = float(re.match(r"([\d.]+) GiB", rows["memory per rank"])[1])
    said = re.findall(r"(\d+) GiB: ", (ROOT / "examples" / name / "README.md").read_text())
    assert round(total) in map(int, said), (rows, said)
    assert total < 72  # of 80 GB, 74.5 GiB
