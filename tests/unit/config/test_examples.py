"""Every configuration in examples/ is one that `check` accepts, with what its README says."""

import re

import pytest

from megatron_rl.cli import check_rows
from megatron_rl.config.checks import check_config
from megatron_rl.config.load import load_config
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
    assert found == {*RECIPES, "countdown", "extend"}  # that one is run: e2e/test_extend.py


@pytest.mark.parametrize("name", ["rspo", "sft"])
def test_the_countdown_example_is_valid(name):
    config = load_config(ROOT / "examples" / "countdown" / f"{name}.yaml", [])
    check_config(config, 2, {"rspo": "train", "sft": "sft"}[name], files=False)


@pytest.mark.parametrize("name, ranks", [(n, r) for n, (_, many) in RECIPES.items() for r in many])
def test_recipes_are_valid_and_need_the_memory_that_is_said(name, ranks):
    config = recipe(name, ranks)
    check_config(config, ranks, "train", files=False)
    rows = dict(check_rows(config))
    total = float(re.match(r"([\d.]+) GiB", rows["memory per rank"])[1])
    said = re.findall(r"(\d+) GiB: ", (ROOT / "examples" / name / "README.md").read_text())
    assert round(total) in map(int, said), (rows, said)
    assert total < 72  # of 80 GB, 74.5 GiB
