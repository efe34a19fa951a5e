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


STUDY_FILES = sorted((ROOT / "examples" / "router_shift_study").glob("*.yaml"))
STUDIES = [path.stem for path in STUDY_FILES if path.stem not in ("rl", "sft")]


@pytest.fixture
def study_folder(tmp_path, monkeypatch):
    """The examples with empty data files."""
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    data = tmp_path / "examples" / "router_shift_study" / "data"
    for task in ("countdown", "sort"):
        (data / task).mkdir(parents=True, exist_ok=True)
        for name in ("sft", "train", "eval"):
            (data / task / f"{name}.jsonl").touch()
    (data / "tokenizer.model").touch()
    monkeypatch.chdir(tmp_path)


def test_the_script_runs_every_study_but_the_search():
    script = (ROOT / "examples" / "router_shift_study" / "run.sh").read_text()
    named = re.search(r"set -- (.*)", script)[1].split()
    assert sorted([*named, "search"]) == STUDIES


@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize("name", STUDIES)
def test_the_studies_are_valid(study_folder, name, quick):
    plan = make_plan(read_study(Path(f"examples/router_shift_study/{name}.yaml")), quick)
    warm, *others = plan.runs
    assert (warm.name, {run.ranks for run in plan.runs}) == ("prepare sft", {1})
    assert {run.config.checkpoint.init_from for run in others} == {warm.run_dir}
    for run in others:  # the same task and model
        assert run.config.model == warm.config.model
        assert (run.config.reward, run.config.data.eval) == (
            warm.config.reward,
            warm.config.data.eval,
        )
        assert run.config.data.train.parent == warm.config.data.train.parent
    seeds = {arm: {run.seed for run in others if run.arm == arm} for arm in plan.arms}
    if quick:
        assert {len(many) for many in seeds.values()} == {1}
    elif name == "search":  # on seeds that the studies do not use
        assert all(min(many) >= 100 for many in seeds.values())
    else:
        assert all(len(many) >= 5 and max(many) < 100 for many in seeds.values())
        assert all(len(seeds[arm]) >= 10 for arm in ("gmpo", "rspo"))


@pytest.mark.parametrize("name, ranks", [(n, r) for n, (_, many) in RECIPES.items() for r in many])
def test_recipes_are_valid_and_need_the_memory_that_is_said(name, ranks):
    config = recipe(name, ranks)
    check_config(config, ranks, "train", files=False)
    rows = dict(check_rows(config))
    total = float(re.match(r"([\d.]+) GiB", rows["memory per rank"])[1])
    said = re.findall(r"(\d+) GiB: ", (ROOT / "examples" / name / "README.md").read_text())
    assert round(total) in map(int, said), (rows, said)
    assert total < 72  # of 80 GB, 74.5 GiB
