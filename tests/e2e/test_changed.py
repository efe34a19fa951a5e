"""Runs that are continued with another configuration or other data; and whose weights are taken."""

import json
import re

import pytest

from megatron_rl.config.load import load_config
from tests.support.recipe import make_recipe
from tests.support.runs import records, run_in_turn

#: One rank, and evaluations that cost little.
FAST = ["--parallel.expert=1", "--parallel.world_size=1", "--evaluate.samples=0"]
FAST += ["--evaluate.problems=2", "--checkpoint.every=1", "--checkpoint.keep=9"]
LINEAR = ["--optimizer.schedule=linear", "--optimizer.min_lr=1e-3"]
OTHER = ["--data.train=data/other.jsonl"]
#: Small steps of reinforcement learning towards the weights of runs/sft.
RL = ["train", "rl.yaml", *FAST, "--rollout.prompts_per_step=2", "--algorithm.reference=initial"]


def sft(steps, *words):
    return ["sft", "sft.yaml", *FAST, *LINEAR, f"--train.steps={steps}", *words]


#: In this order; each is the next thing a user does.
COMMANDS = {
    "sft": sft(2),
    "rl": [*RL, "--train.steps=1"],
    "longer": sft(4, "--optimizer.lr=8e-3", "--optimizer.weight_decay=0.1"),
    "other seed": sft(5, "--seed=2"),
    "other verb": ["train", *sft(5)[1:]],
    "other data": sft(5, *OTHER),
    "other data accepted": sft(5, *OTHER, "--checkpoint.changed_data=accept"),
    "other reference": [*RL, "--train.steps=2"],
    "other loss": [
        *(*RL, "--train.steps=2", "--algorithm.name=grpo", "--rollout.temperature=0.8"),
        "--checkpoint.init_from=runs/sft/checkpoints/step_2",
    ],
    "typo": ["evaluate", "rl.yaml", *FAST, "--run_dir=runs/lr"],
    "typo in generate": ["generate", "rl.yaml", *FAST, "--run_dir=runs/lr", "--prompt=1 2=3:"],
    "evaluate": ["evaluate", "rl.yaml", *FAST, "--checkpoint.resume=never"],
    "base": ["evaluate", "rl.yaml", *FAST, "--run_dir=runs/lr", "--base"],
    "old": sft(2, "--run_dir=runs/anew"),
    "anew": sft(1, "--run_dir=runs/anew", "--checkpoint.resume=never", "--optimizer.lr=2e-2"),
    "base of nothing": ["evaluate", "sft.yaml", *FAST, "--base"],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The recipe, and a data file of as many lines whose answers are others."""
    folder = make_recipe(tmp_path_factory.mktemp("changed"))
    lines = records(folder / "data" / "sft.jsonl")
    answers = [line["completion"] for line in lines]
    for line, answer in zip(lines, answers[1:] + answers[:1]):
        line["completion"] = answer
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "data" / "other.jsonl").write_text(text)
    return folder


@pytest.fixture(scope="module")
def done(folder):
    """Every command's result."""
    return run_in_turn(COMMANDS, folder)


SFT_4 = "runs/sft/checkpoints/step_4"


def metric(folder, run, name):
    return {row["step"]: row.get(name) for row in records(folder / "runs" / run / "metrics.jsonl")}


def largest_step(folder, before, after):
    """The largest change of a weight between two checkpoints of runs/sft."""
    from tests.support.tiny import cpu_device

    cpu_device()  # Megatron has to be imported after it
    from megatron_rl.checkpoint.torch_dist import StoredTensors

    root = folder / "runs" / "sft" / "checkpoints"
    old, new = (StoredTensors(root / f"step_{step}" / "shards") for step in (before, after))
    names = [name for name in old.shapes if not name.startswith("optimizer.")]
    assert len(names) > 10
    return max((new.get(name) - old.get(name)).abs().max().item() for name in names)


def test_the_schedule_is_that_of_the_configuration(folder, done):
    """Two steps of lr 1e-2 down to 1e-3; then steps 3 and 4 of four, of 8e-3 down to 1e-3."""
    assert done["sft"].code == done["longer"].code == 0, done["longer"].err
    lr = metric(folder, "sft", "lr")
    assert [lr[1], lr[2]] == pytest.approx([1e-3 + 9e-3 / 2, 1e-3])
    assert [lr[3], lr[4]] == pytest.approx([1e-3 + 7e-3 / 4, 1e-3])
    # Adam's steps are about as large as the learning rate, and never much larger.
    assert 0.5 * lr[3] < largest_step(folder, 2, 3) < 3 * lr[3]
    assert 0.5 * lr[4] < largest_step(folder, 3, 4) < 3 * lr[4]


def test_what_changed_is_said_key_by_key_and_kept(folder, done):
    out = done["longer"].out
    assert "continuing from runs/sft/checkpoints/step_2 (step 2)\nchanged since step 2:\n" in out
    start = out.index("changed since")
    assert out[start:].splitlines()[1:4] == [
        "  optimizer.lr 0.01 -> 0.008",
        "  optimizer.weight_decay 0.0 -> 0.1",
        "  train.steps 2 -> 4",
    ]
    configs = folder / "runs" / "sft" / "configs"
    assert {path.name for path in configs.iterdir()} == {
        "step_0.yaml",
        "step_3.yaml",
        "step_5.yaml",
    }
    rates = [load_config(configs / f"step_{n}.yaml").optimizer.lr for n in (0, 3)]
    assert rates == [1e-2, 8e-3]
    under = metric(folder, "sft", "configuration")
    assert [under[step] for step in range(6)] == [0, 0, 0, 3, 3, 5]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "other seed",
            "seed was 1 in the run that wrote runs/sft/checkpoints/step_4 and is 2 now; ",
        ),
        (
            "other verb",
            "runs/sft/checkpoints/step_4 is of a run of sft; expected one of train; use ",
        ),
        (
            "other data",
            f"data.train data/other.jsonl does not give what {SFT_4} was trained on (41 as "
            "before, with other tokens: other lines, or another tokenizer, chat template or key); "
            "expected the same; restore file, tokenizer and keys, or go on with these with ",
        ),
        (
            "other reference",
            "algorithm.reference initial would be runs/sft/checkpoints/step_5 and was "
            "runs/sft/checkpoints/step_2 in the run that wrote runs/rl/checkpoints/step_1; ",
        ),
        ("typo", "runs/lr does not exist; expected a run directory; correct run_dir, train "),
        ("typo in generate", "runs/lr does not exist; expected a run directory; correct run_dir, "),
        ("base of nothing", "--base asks for the weights a run starts from, and neither checkpoi"),
    ],
)
def test_what_would_be_another_thing_is_refused(done, name, message):
    refused = done[name]
    assert refused.code == 2, refused.out
    assert refused.out == "" and refused.err.count("\n") == 1
    assert refused.err.startswith(f"megatron-rl: error: {message}")
    if name.startswith("other"):
        path = (
            f"runs/{'rl/checkpoints/step_1' if 'reference' in name else 'sft/checkpoints/step_4'}"
        )
        anew = f"start a new run from these weights: another run_dir, checkpoint.init_from {path}\n"
        assert refused.err.endswith(anew)


def test_other_data_is_taken_when_told_to(done):
    accepted = done["other data accepted"]
    assert accepted.code == 0, accepted.err
    assert "  data.train data/sft.jsonl -> data/other.jsonl\n" in accepted.out
    assert accepted.err.startswith("warning: data.train data/other.jsonl has changed (41 as ")
    assert "step 5/5" in accepted.out


def test_a_run_of_two_losses_is_reported_as_one_of_two(folder, done):
    assert done["other loss"].code == 0, done["other loss"].err
    assert "  algorithm.name rspo -> grpo\n" in done["other loss"].out
    assert "  rollout.temperature 1.0 -> 0.8\n" in done["other loss"].out
    page = (folder / "runs" / "rl" / "report.html").read_text()
    assert "<dd>rspo, " in page and "; from step 2: grpo, " in page
    assert "<td class='number'>2</td><td>rollout.temperature</td><td>1.0</td><td>0.8</td>" in page


def test_a_run_is_measured_by_its_own_weights(done):
    """Also where the configuration has its runs start anew."""
    assert re.search(r"weights +runs/rl/checkpoints/step_2\n", done["evaluate"].out)
    assert done["evaluate"].out.splitlines()[-1].startswith("eval at step 2  ")


def test_the_base_model_is_measured_when_asked_for(done):
    assert re.search(r"weights +runs/sft/checkpoints/step_5\n", done["base"].out)


def test_a_run_that_starts_anew_leaves_nothing_of_the_old_one_to_go_on_from(folder, done):
    assert done["anew"].code == 0, done["anew"].err
    assert "moved the checkpoints in runs/anew aside: a new run\n" in done["anew"].out
    run_dir = folder / "runs" / "anew"
    assert {path.name for path in (run_dir / "checkpoints").glob("step_*")} == {"step_1"}
    assert (run_dir / "checkpoints.old-1" / "step_2" / "manifest.json").is_file()
    rates = [
        load_config(run_dir / folder / "step_0.yaml").optimizer.lr
        for folder in ("configs", "configs.old-1")
    ]
    assert rates == [2e-2, 1e-2]
