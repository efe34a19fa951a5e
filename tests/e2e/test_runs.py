"""Whole runs through the command line: what they print, what they write, and that it repeats."""

import json
import re
import subprocess
import sys

import pytest

from tests.support.pages import charts_of, data_of
from tests.support.runs import ROOT, records, reproducible, run, succeed

#: What every record of reinforcement learning holds.
RL_KEYS = """
    step reward/mean reward/solved loss grad_norm clip_fraction entropy kl_old router/shift_mean
    router/shift_min router/floor_fraction router/top_k_overlap router/load_max_over_mean
    tokens_per_second time/rollout_s time/score_s time/update_s memory/peak_gib
""".split()
EVAL_KEYS = ["eval/pass@1", "eval/mean@k", "eval/well_formed", "eval/problems", "eval/samples"]
ONE_RANK = ["--parallel.expert", "1", "--parallel.world_size", "1"]


def test_supervised_warm_up_learns_and_writes_its_run(folder, sft_run):
    run_dir = folder / "runs" / "sft"
    metrics = records(run_dir / "metrics.jsonl")
    assert [record["step"] for record in metrics] == list(range(61))
    assert metrics[60]["loss"] < 0.5 * metrics[1]["loss"]
    assert metrics[60]["eval/pass@1"] > metrics[0]["eval/pass@1"]
    assert {record["step"] for record in records(run_dir / "samples.jsonl")} == {0, 60}
    assert (run_dir / "checkpoints" / "latest").read_text() == "step_60\n"
    assert list(run_dir.glob("tensorboard/events.*"))


def test_reinforcement_learning_writes_its_run(folder, rl_run):
    run_dir = folder / "runs" / "rl"
    metrics = records(run_dir / "metrics.jsonl")
    assert [record["step"] for record in metrics] == list(range(9))
    for record in metrics[1:]:
        assert set(RL_KEYS) - {name for name, value in record.items() if value is not None} == set()
        # Which answers are sampled hangs on rounding: a step may have no group of unequal rewards.
        some_differ = record["groups/zero_variance_fraction"] < 1
        assert (record["grad_norm"] > 0) == some_differ
        assert 0.5 < record["router/shift_mean"] <= 1
        assert 0 < record["router/top_k_overlap"] <= 1
        assert 1 <= record["response/length_mean"] <= record["response/length_max"] <= 12
        assert record["mismatch/logprob_max"] < 1e-4  # sampler and scoring pass agree
    assert any(record["grad_norm"] > 0 for record in metrics[1:])
    assert min(record["router/shift_mean"] for record in metrics[1:]) < 1
    evaluated = [record["step"] for record in metrics if set(EVAL_KEYS) <= set(record)]
    assert evaluated == [0, 3, 6, 8]
    assert "loss" not in metrics[0]
    samples = records(run_dir / "samples.jsonl")
    assert [sample["step"] for sample in samples] == [n for n in range(9) for _ in range(4)]
    assert all(sample["reward"] in (0.0, 0.1, 1.0) for sample in samples)
    config = (run_dir / "config.yaml").read_text()
    assert "prompts_per_step: 8" in config and "temperature: 1.0" in config  # defaults as well
    assert {path.name for path in (run_dir / "checkpoints").iterdir()} == {
        "latest",
        "step_4",
        "step_8",
    }


def test_the_step_0_evaluation_is_that_of_the_weights_it_starts_from(folder, rl_run):
    last = records(folder / "runs" / "sft" / "metrics.jsonl")[-1]
    first = records(folder / "runs" / "rl" / "metrics.jsonl")[0]
    assert {name: first[name] for name in EVAL_KEYS} == {name: last[name] for name in EVAL_KEYS}


def test_the_console_says_what_runs_and_nothing_else(folder, rl_run):
    assert rl_run.err == ""  # no warning, no log line of a library
    lines = rl_run.out.splitlines()
    header = dict(line.split("  ", 1) for line in lines[:13])
    assert {name: text.strip() for name, text in header.items()} == {
        "run": "runs/rl",
        "model": "35,296 parameters, 23,008 active for a token: 2 layers (2 MoE), 4 experts, top-2",
        "layout": "2 ranks: data 2, expert 2",
        "device": "cpu, fp32",
        "answers end": "with token 3 (tokenizer)",
        "decoding": "by each rank alone, with copies of all experts",
        "experts": "weights travel between ranks, tokens stay",
        "data": "24 problems (data/train.jsonl), 16 held-out (data/eval.jsonl), reward countdown",
        "prompts": "text as it stands (data.chat auto)",
        "step": "8 problems x 4 answers of 12 tokens at most, 2 mini-batches x 1 epoch",
        "algorithm": "rspo, group_norm advantages, router shift with floor 0.8",
        "optimizer": "adam, learning rate 0.001",
        "router trace": "20 bytes a token over all pipeline stages; at most 6.25 KiB of device "
        "memory on a rank, for sequences of 20 tokens; the sampler's up to 6.25 KiB of host memory",
    }
    steps = [line for line in lines if line.startswith("step ") and "/8  " in line]
    assert len(steps) == 8 and len({len(line) for line in steps}) == 1  # columns line up
    evaluations = [line for line in lines if line.startswith("eval at step ")]
    assert [int(line.split()[3]) for line in evaluations] == [0, 3, 6, 8]
    assert lines[-2].startswith("solved (greedy pass@1) ")
    assert lines[-1] == "report: runs/rl/report.html"


def test_the_report_has_charts_and_can_be_written_again(folder, rl_run):
    report = folder / "runs" / "rl" / "report.html"
    before = report.read_text()
    charts = charts_of(before)
    metrics = records(folder / "runs" / "rl" / "metrics.jsonl")
    solved = [float(f"{r['reward/solved']:.6g}") for r in metrics if "reward/solved" in r]
    (drawn,) = [s for s in charts["reward"]["series"] if s["name"] == "solved"]
    assert drawn["values"] == solved and len(solved) == 8
    assert charts["router_distance"]["kind"] == "heatmap"
    report.unlink()
    done = succeed("report", "runs/rl", cwd=folder)
    assert done.out == "runs/rl/report.html\n" and done.err == ""
    assert len(report.read_text()) > 0.9 * len(before)


def test_samples_hold_what_the_update_saw_of_their_tokens(folder, rl_run):
    """Three mini-batches: before the last update policy and routers have moved."""
    rows = records(folder / "runs" / "rl" / "samples.jsonl")
    rows = [row for row in rows if row["step"] > 0]
    moved = []
    for row in rows:
        values = row["by_token"]
        assert len(values["text"]) == len(values["ratio"]) == len(values["gamma"]) == row["tokens"]
        assert "".join(values["text"]).strip().startswith(row["completion"].strip())
        assert 0.8 <= min(values["gamma"]) and max(values["gamma"]) <= 1.0
        moved.append(max(abs(ratio - 1.0) for ratio in values["ratio"]) > 1e-3)
    assert any(moved) and not all(moved)
    assert {row["advantage"] > 0 for row in rows} == {True, False}
    page = data_of((folder / "runs" / "rl" / "report.html").read_text())
    assert page["samples"][-1]["tokens"]["gamma"] == rows[-1]["by_token"]["gamma"]


def test_another_seed_is_another_run(folder, rl_run, other_seed):
    def first_samples(name):
        samples = records(folder / "runs" / name / "samples.jsonl")
        return [sample for sample in samples if sample["step"] == 1]

    same, other = first_samples("rl"), first_samples("other_seed")
    assert len(same) == len(other) == 4
    assert same != other
    metrics = [reproducible(folder / "runs" / name)[1] for name in ("rl", "other_seed")]
    assert metrics[0]["mismatch/kl"] != metrics[1]["mismatch/kl"]


@pytest.fixture(scope="session")
def other_seed(folder, sft_run):
    """One step with another seed, and a learning rate that ruins the weights in it."""
    words = ["--run_dir", "runs/other_seed", "--seed", "2", "--optimizer.lr", "1e30"]
    words += ["--algorithm.mini_batches=1"]
    return run("train", "rl.yaml", *words, cwd=folder, ranks=2, warm=True)


def test_a_run_whose_answers_are_not_finite_ends_with_one_line_and_code_1(folder, other_seed):
    assert other_seed.ranks == (1, 1)
    (line,) = other_seed.errors
    assert "error: the sampler's log-probabilities are not finite in " in line
    assert not re.search(r"megatron_rl/(policy|tasks|run)/", other_seed.err)  # no traceback
    assert [r["step"] for r in records(folder / "runs" / "other_seed" / "metrics.jsonl")] == [0, 1]
    assert not list((folder / "runs" / "other_seed").glob("checkpoints/step_*"))


@pytest.fixture(scope="session")
def ruined(folder, rl_run):
    """The finished run continued with a learning rate that ruins the weights."""
    words = ["train", "rl.yaml", "--run_dir", "runs/ruined"]
    subprocess.run(["cp", "-r", "runs/rl", "runs/ruined"], cwd=folder, check=True)
    words += ["--train.steps=10", "--optimizer.lr=1e30"]
    return run(*words, cwd=folder, ranks=2, warm=True)


def test_a_gradient_that_is_not_finite_ends_the_run_and_is_named(folder, ruined):
    assert ruined.ranks == (1, 1)
    (line,) = ruined.errors
    assert "error: the gradient norm is nan: " in line
    assert " gradients are not finite, first that of embedding.word_embeddings.weight " in line
    assert not re.search(r"megatron_rl/(policy|tasks|run)/", ruined.err)
    assert (folder / "runs" / "ruined" / "checkpoints" / "latest").read_text() == "step_8\n"


def test_evaluate_takes_the_last_good_checkpoint_and_repeats_the_runs_evaluation(folder, ruined):
    done = succeed("evaluate", "rl.yaml", "--run_dir", "runs/ruined", cwd=folder, ranks=2)
    last = records(folder / "runs" / "rl" / "metrics.jsonl")[-1]
    line = done.out.splitlines()[-1]
    expected = [f"{100 * last[name]:.1f}%" for name in EVAL_KEYS[:3]]
    assert [word for word in line.split() if word.endswith("%")] == expected
    assert line.startswith("eval at step 8  pass@1 ") and "16 problems" in line
    assert re.search("weights +runs/ruined/checkpoints/step_8", done.out)
    assert done.err == ""


def test_generate_answers_each_prompt_as_the_run_did(folder, sft_run):
    """Greedily (top_k 1), from a checkpoint of two ranks, on one."""
    samples = records(folder / "runs" / "sft" / "samples.jsonl")
    answers = [s["prompt"] + s["completion"] for s in samples if s["step"] == 60]
    prompts = [word for s in samples if s["step"] == 60 for word in ("--prompt", s["prompt"])]
    done = succeed("generate", "sft.yaml", *ONE_RANK, "--rollout.top_k=1", *prompts, cwd=folder)
    assert done.out.splitlines() == answers and len(answers) == 4
    assert done.err == ""


def test_generate_writes_several_answers_to_each_prompt_of_a_file(folder, sft_run):
    """Over two ranks, a few prompts at a time; the first answer is that of the prompt alone."""
    output = folder / "answers.jsonl"
    words = ["--prompts", "data/eval.jsonl", "--samples", "3", "--output", "answers.jsonl"]
    more = ["--rollout.max_batch", "12", "--rollout.temperature", "2.0"]
    done = succeed("generate", "sft.yaml", *words, *more, cwd=folder, ranks=2)
    assert (done.out, done.err) == ("", "")
    rows = records(output)
    prompts = [record["prompt"] for record in records(folder / "data" / "eval.jsonl")]
    assert [(row["index"], row["sample"]) for row in rows] == [
        (index, number) for index in range(16) for number in range(3)
    ]
    assert [row["prompt"] for row in rows[::3]] == prompts
    assert all(row["logprob"] < 0.0 and 1 <= row["tokens"] <= 12 for row in rows)
    answers = {(row["index"], row["completion"]) for row in rows}
    assert len(answers) > 24  # those of a prompt differ
    alone = ["--prompt", prompts[0], "--rollout.temperature", "2.0"]
    done = succeed("generate", "sft.yaml", *ONE_RANK, *alone, cwd=folder)
    assert done.out == f"{prompts[0]}{rows[0]['completion']}\n"
    again = run("generate", "sft.yaml", *ONE_RANK, *words, cwd=folder, warm=True)
    assert again.code == 2 and len(records(output)) == 48
    assert again.errors == [
        "megatron-rl: error: --output answers.jsonl exists; expected a new file; name another, or "
        "move it"
    ]


def test_without_held_out_problems_nothing_is_evaluated(folder, sft_run):
    words = ["--run_dir", "runs/no_eval", "--data.eval", "null", "--train.steps", "1"]
    done = succeed("train", "rl.yaml", *ONE_RANK, *words, cwd=folder)
    data = "24 problems (data/train.jsonl), no evaluation: data.eval is not given, reward countdown"
    assert f"  {data}\n" in done.out and "eval at step" not in done.out
    assert done.out.splitlines()[-1] == "report: runs/no_eval/report.html"
    (metrics,) = records(folder / "runs" / "no_eval" / "metrics.jsonl")
    assert metrics["step"] == 1 and not [name for name in metrics if name.startswith("eval/")]


def test_check_shows_ranks_memory_and_trace(folder):
    done = succeed("check", "rl.yaml", cwd=folder)
    cells = [line.strip("│").split("│") for line in done.out.splitlines() if "│" in line]
    rows = {name.strip(): value.strip() for name, value in cells}
    assert rows["ranks"] == "2"
    assert rows["layout"] == "data 2, expert 2"
    assert rows["memory per rank"].endswith("MiB in an update, of which")
    assert rows["router trace"] == "20 bytes a token over all pipeline stages"


def test_help_starts_without_torch():
    code = (
        "import sys\nfrom megatron_rl.cli import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit as stop:\n    assert stop.code == 0\n"
        "print({'torch', 'megatron'} & set(sys.modules))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert "usage: megatron-rl" in done.stdout
    assert done.stdout.endswith("\nset()\n"), done.stderr


def test_metrics_are_strict_json(folder, rl_run):
    def refuse(text):
        raise AssertionError(f"{text} is no JSON")

    for name in ("metrics.jsonl", "samples.jsonl"):
        for line in (folder / "runs" / "rl" / name).read_text().splitlines():
            json.loads(line, parse_constant=refuse)
