"""A family of a user's own, in a file outside the package: the same model under other names is
trained, converted and answers as under its own.
"""

import shutil

import pytest
import torch

from tests.e2e.test_convert import make_folder
from tests.support.own_family import FILE, renamed, save_renamed, tensors
from tests.support.runs import reproducible, run_in_turn

pytestmark = pytest.mark.conversion
MINE = ("--model.hf_path=mine", "--model.family=./my_family.py:FAMILY")
ALONE = ("--parallel.expert=1", "--parallel.world_size=null", "--train.steps=1", "--data.eval=null")
GREEDY = ("--greedy", "--prompt=3+4=", "--base")


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """The folder, and what each command gave, for the model under its name and the other."""
    folder = make_folder(tmp_path_factory.mktemp("family"), "qwen3_moe, dense layers")
    shutil.copy(FILE, folder)
    save_renamed(folder / "model", folder / "mine")
    mine = (*MINE, "--run_dir=runs/mine")
    commands = {
        "unknown": ["check", "rl.yaml", *ALONE, MINE[0]],
        "train": ["train", "rl.yaml", *ALONE, "--run_dir=runs/theirs"],
        "train mine": ["train", "rl.yaml", *ALONE, *mine],
        "convert": ["convert", "runs/theirs", "theirs"],
        "convert mine": ["convert", "runs/mine", "converted"],
        "back": ["convert", "converted", "again", MINE[1]],
        "verify": ["convert", "converted", "verified", MINE[1], "--verify"],
        "generate": ["generate", "rl.yaml", *ALONE, *GREEDY, "--model.hf_path=theirs"],
        "generate mine": [
            "generate",
            "rl.yaml",
            *ALONE,
            *GREEDY,
            MINE[1],
            "--model.hf_path=converted",
        ],
    }
    return folder, run_in_turn(commands, folder)


def test_a_model_type_that_is_unknown_names_the_way_out(done):
    _, results = done
    assert results["unknown"].code == 2
    assert results["unknown"].err.startswith(
        "megatron-rl: error: mine/config.json: model_type 'my_moe' is not supported; expected"
    )
    assert results["unknown"].err.endswith("or one of a family of your own (model.family)\n")


def test_it_is_trained_as_under_its_own_name(done):
    folder, results = done
    for name in ("train", "train mine"):
        assert results[name].code == 0, results[name].err
    first, second = (reproducible(folder / "runs" / name) for name in ("theirs", "mine"))
    assert first == second and first[-1]["grad_norm"] > 0.0


def test_what_is_converted_has_its_names_and_the_same_values(done):
    folder, results = done
    for name in ("convert", "convert mine", "back"):
        assert results[name].code == 0, results[name].err
    theirs, mine = tensors(folder / "theirs"), tensors(folder / "converted")
    before = tensors(folder / "model")
    assert (
        set(mine) == set(map(renamed, theirs)) and "model.layers.1.mlp.router.proj.weight" in mine
    )
    assert all(torch.equal(mine[renamed(name)], theirs[name]) for name in theirs)
    assert not all(torch.equal(before[name], theirs[name]) for name in theirs)  # it has learnt
    config = (folder / "mine" / "config.json").read_bytes()
    assert (folder / "converted" / "config.json").read_bytes() == config


def test_it_answers_as_under_its_own_name(done):
    _, results = done
    assert results["generate"].code == 0, results["generate"].err
    assert results["generate mine"].code == 0, results["generate mine"].err
    assert results["generate mine"].out == results["generate"].out


def test_verify_says_what_transformers_does_not_know(done):
    folder, results = done
    assert results["verify"].code == 2 and not (folder / "verified").exists()
    assert "logits of a model_type 'my_moe', which it does not know" in results["verify"].err
