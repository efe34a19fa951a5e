"""The folder of a user who has the wheel installed and not this repository, with a loss, rewards,
advantages, data, a rollout engine, an environment, an optimizer and a logger of its own.
"""

import json
import random
import shutil
import zipfile

import pytest

from tests.support.runs import ROOT, records, run_in_turn
from tests.support.wheel import installed_in


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """Where the wheel is built and installed, and its interpreter."""
    place = tmp_path_factory.mktemp("installed")
    return place, installed_in(place)


@pytest.fixture(scope="module")
def done(folder, installed, tmp_path_factory):
    """What the commands of the example's README gave, and the folder."""
    place = tmp_path_factory.mktemp("somewhere")
    (place / "countdown").symlink_to(folder)
    mine = shutil.copytree(ROOT / "examples" / "extend", place / "extend")
    cpu = ["--device.kind", "cpu", "--device.threads", "1"]
    commands = {
        "list": ["list", "losses", "./my_loss.py:my_loss"],
        "mistake": ["check", "run.yaml", "--algorithm.settings.clp", "0.1"],
        "data": ["data", "run.yaml", "--examples", "1"],
        "train": ["train", "run.yaml", *cpu],
        "begun": ["train", "run.yaml", *cpu, "--run_dir", "runs/again", "--train.steps", "2"],
        "resumed": ["train", "run.yaml", *cpu, "--run_dir", "runs/again"],
        "engine": [
            *("train", "run.yaml", *cpu, "--run_dir", "runs/engine"),
            *("--rollout.engine", "./my_engine.py:TransformersEngine"),
        ],
        "turns": [
            *("train", "run.yaml", *cpu, "--run_dir", "runs/turns", "--rollout.max_turns", "2"),
            *("--rollout.environment", "./my_environment.py:ask_again"),
            *("--rollout.environment_settings.word", "+", "--observe.samples", "64"),
            *("--algorithm.routing_replay", "r3"),
        ],
    }
    return run_in_turn(commands, mine, installed[1]), mine


def test_the_wheel_holds_the_pages_script_and_style(installed):
    place, _ = installed
    (wheel,) = (place / "build").glob("*.whl")
    files = (ROOT / "megatron_rl" / "report" / "page_files").iterdir()
    wanted = {f"megatron_rl/report/page_files/{path.name}" for path in files}
    assert len(wanted) == 7 and wanted <= set(zipfile.ZipFile(wheel).namelist())


def test_its_loss_is_listed_and_its_settings_are_checked(done):
    results, _ = done
    assert results["list"].code == 0
    assert "Clipped token ratios, mean over each answer, then over answers." in results["list"].out
    assert results["mistake"].code == 2
    assert results["mistake"].err == (
        "megatron-rl: error: algorithm.settings.clp is no setting of the loss "
        "./my_loss.py:my_loss (did you mean clip?); expected one of clip\n"
    )


def test_its_reward_trains_and_is_shown_apart(done):
    results, mine = done
    assert results["train"].code == 0, results["train"].err
    assert "./my_loss.py:my_loss" in results["train"].out
    assert str(ROOT) not in (mine / "runs/extend/config.yaml").read_text()
    steps = [row for row in records(mine / "runs/extend/metrics.jsonl") if "loss" in row]
    assert [row["step"] for row in steps] == [1, 2, 3]
    for row in steps:
        whole = row["reward/countdown"] + 0.2 * row["reward/brevity"] + 0.1 * row["reward/judge"]
        assert row["reward/mean"] == pytest.approx(whole)
        assert row["reward/late"] == 0.0 and 0.0 <= row["loss/cut"] <= 1.0
        assert row["grad_norm"] > 0.0
    assert any(row["reward/brevity"] > 0 for row in steps)


def test_its_engine_gives_the_answers_of_the_built_in_one(done):
    """Of the same random numbers, by transformers on weights that it exported."""
    results, mine = done
    assert results["engine"].code == 0, results["engine"].err
    assert "rollout      ./my_engine.py:TransformersEngine" in results["engine"].out
    runs = [
        [row for row in records(mine / "runs" / name / "metrics.jsonl") if "loss" in row]
        for name in ("extend", "engine")
    ]
    names = ("reward/mean", "reward/judge", "loss", "grad_norm")
    for builtin, own in zip(*runs, strict=True):
        assert builtin["step"] == own["step"]
        for name in names:
            assert own[name] == pytest.approx(builtin[name], rel=1e-3, abs=1e-5), name


def test_its_environment_asks_again(done):
    """Behind some answers stands the problem, and then another answer, which is judged."""
    results, mine = done
    assert results["turns"].code == 0, results["turns"].err
    assert "./my_environment.py:ask_again, up to 2 answers a conversation" in results["turns"].out
    steps = [row for row in records(mine / "runs/turns/metrics.jsonl") if "loss" in row]
    assert [row["step"] for row in steps] == [1, 2, 3]
    assert all(row["grad_norm"] > 0.0 for row in steps)
    samples = records(mine / "runs/turns/samples.jsonl")
    asked = [row for row in samples if f"+{row['prompt']}" in row["completion"]]
    assert 3 < len(asked) < len(samples)
    for row in samples:  # what the environment says is no token of the policy's
        assert row["tokens"] <= (32 if row in asked else 16)


def test_its_logger_gets_each_step(done):
    _, mine = done
    head, *lines = (mine / "runs/extend/steps.csv").read_text().splitlines()
    assert head == "step,loss,reward/mean,grad_norm"
    rows = records(mine / "runs/extend/metrics.jsonl")
    assert [line.split(",") for line in lines] == [
        [str(row["step"]), *(str(row.get(name, "")) for name in head.split(",")[1:])]
        for row in rows
    ]
    assert len(lines) == 3


def test_its_optimizer_trains(done):
    results, mine = done
    assert "Lion, beta2 0.98, learning rate 0.0001" in results["train"].out
    state = json.loads((mine / "runs/extend/checkpoints/step_3/state.json").read_text())
    assert "./my_optimizer.py:Lion" in state["identity"]["code"]
    manifest = json.loads((mine / "runs/extend/checkpoints/step_3/manifest.json").read_text())
    assert manifest["step"] == 3


def test_its_data_is_mixed_in_and_shown(done):
    results, mine = done
    assert results["data"].code == 0, results["data"].err
    assert "mixture: 0.75 train (" in results["data"].out
    assert "0.25 sums (100)" in results["data"].out
    assert "my_source.py:sums, record 1: a prompt of" in results["data"].out
    numbers = random.Random(1)
    first, second = numbers.randint(1, 20), numbers.randint(1, 20)
    assert f"  | <s>{first} {second}={first + second}:\n" in results["data"].out
    for row in records(mine / "runs/extend/metrics.jsonl"):
        if "loss" in row:
            assert row["share/train"] == 0.75 and row["share/sums"] == 0.25
            whole = 0.75 * row["data/train"] + 0.25 * row["data/sums"]
            assert row["reward/mean"] == pytest.approx(whole)


def test_its_mixture_is_resumed_to_the_bit(done):
    results, mine = done
    assert results["begun"].code == results["resumed"].code == 0, results["resumed"].err
    (whole, again) = (
        [row for row in records(mine / "runs" / name / "metrics.jsonl") if "loss" in row]
        for name in ("extend", "again")
    )
    assert [row["step"] for row in again] == [1, 2, 3]
    for one, other in zip(whole, again, strict=True):
        for name in ("loss", "grad_norm", "reward/mean", "data/train", "data/sums", "tokens/step"):
            assert one[name] == other[name], name
