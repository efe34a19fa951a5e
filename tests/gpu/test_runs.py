"""Whole runs on CUDA through the command line: the recipe of tests/e2e on one device."""

from functools import partial

import pytest

from tests.support import runs
from tests.support.recipe import make_recipe
from tests.support.runs import records

pytestmark = pytest.mark.gpu

succeed = partial(runs.succeed, warm=False)  # warm ranks are of a CPU

ONE = ["--parallel.expert", "1", "--parallel.world_size", "1"]
ON = {
    "cpu": [*ONE, "--device.kind", "cpu"],
    "local": [*ONE, "--device.kind", "cuda", "--model.transformer_engine", "false"],
    "te": [*ONE, "--device.kind", "cuda", "--model.transformer_engine", "true"],
    "bf16": [*ONE, "--device.kind", "cuda", "--model.dtype", "bf16"],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The recipe, and a supervised run on CUDA in runs/sft."""
    folder = make_recipe(tmp_path_factory.mktemp("countdown"))
    succeed("sft", "sft.yaml", *ON["te"], cwd=folder)
    return folder


def metrics(folder, name):
    return records(folder / "runs" / name / "metrics.jsonl")


def test_supervised_training_learns(folder):
    losses = [record["loss"] for record in metrics(folder, "sft")[1:]]
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("name", ["local", "te"])
def test_reinforcement_learning_gives_the_metrics_of_the_cpu(folder, name):
    for where in {"cpu", name}:
        if not (folder / "runs" / where).exists():
            succeed("train", "rl.yaml", *ON[where], "--run_dir", f"runs/{where}", cwd=folder)
    # Later steps may part: one answer drawn otherwise changes all that follow.
    for found, expected in zip(metrics(folder, name)[1:3], metrics(folder, "cpu")[1:3]):
        assert found["mismatch/logprob_max"] < 1e-4
        for key in ("loss", "grad_norm", "entropy", "router/raw_gamma_mean", "reward/mean"):
            assert found[key] == pytest.approx(expected[key], rel=1e-3, abs=1e-5), key


def test_bf16_with_background_saves_resumes(folder):
    words = [*ON["bf16"], "--run_dir", "runs/bf16", "--checkpoint.asynchronous", "true"]
    succeed("train", "rl.yaml", *words, "--train.steps", "4", cwd=folder)
    succeed("train", "rl.yaml", *words, cwd=folder)
    found = metrics(folder, "bf16")
    assert [record["step"] for record in found] == list(range(9))
    norms = [record["grad_norm"] for record in found[1:]]
    assert 0 < max(norms) < 100  # a step whose answers are all alike has none
    assert max(record["mismatch/logprob_max"] for record in found[1:]) < 0.5
    assert all(record["memory/peak_gib"] > 0 for record in found[1:])


def test_a_checkpoint_of_cuda_goes_on_with_the_cpu(folder):
    if not (folder / "runs" / "te").exists():
        succeed("train", "rl.yaml", *ON["te"], "--run_dir", "runs/te", cwd=folder)
    words = ["--run_dir", "runs/te", "--train.steps", "9"]
    succeed("train", "rl.yaml", *ON["cpu"], *words, cwd=folder)
    assert metrics(folder, "te")[-1]["step"] == 9
