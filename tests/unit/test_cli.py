"""The command line: exit codes, one-line errors, dispatch and a start without heavy imports."""

import subprocess
import sys
import types
from pathlib import Path

import pytest

from megatron_rl import __version__
from megatron_rl.cli import PATIENCE_S, VERBS, main, split_overrides
from megatron_rl.errors import UserError
from tools.data.train_tokenizer import train_tokenizer

ROOT = Path(__file__).parents[2]
PROBLEM = '{"prompt": "3 4=7:", "completion": "3+4", "numbers": [3, 4], "target": 7}'
TOKENIZER = train_tokenizer(["3 4=7:+-2bc\n"], "char", 32)


@pytest.fixture
def run_yaml(tmp_path, monkeypatch):
    """A valid run.yaml with its files, in the current directory."""
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    Path("tok.model").write_bytes(TOKENIZER)
    for name in ("train.jsonl", "eval.jsonl"):
        Path(name).write_text(PROBLEM + "\n")
    Path("run.yaml").write_text(
        "model: {preset: tiny_moe}\n"
        "data: {tokenizer: {path: tok.model}, train: train.jsonl, eval: eval.jsonl}\n"
    )
    return "run.yaml"


@pytest.fixture
def training(monkeypatch):
    """Stands in for megatron_rl.training.run and records the calls."""
    calls = []
    module = types.ModuleType("megatron_rl.training.run")
    for verb in ("train", "sft", "evaluate"):
        setattr(module, verb, lambda config, data, verb=verb: calls.append((verb, config, data)))
    module.generate = lambda *arguments: calls.append(("generate", *arguments))
    device = types.ModuleType("megatron_rl.device.select")
    device.select_device = lambda config, launch: None
    monkeypatch.setitem(sys.modules, "megatron_rl.device.select", device)
    monkeypatch.setitem(sys.modules, "megatron_rl.training.run", module)
    monkeypatch.setattr("megatron_rl.training.run", module, raising=False)
    return calls


def refusal(capsys, *words):
    """The one line with which a command is refused."""
    assert main(words) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1 and captured.err.startswith("megatron-rl: error: ")
    return captured.err[len("megatron-rl: error: ") : -1]


@pytest.mark.parametrize("verb", ["train", "sft", "evaluate"])
def test_a_verb_gets_the_config_with_its_overrides(run_yaml, training, verb):
    assert main([verb, run_yaml, "--seed", "5", "--algorithm.settings.clip_low=0.3"]) == 0
    assert main([verb, "--seed=6", run_yaml]) == 0
    assert [(call[0], call[1].seed) for call in training] == [(verb, 5), (verb, 6)]
    assert training[0][1].algorithm.settings == {"clip_low": 0.3}
    data = training[0][2]
    read = {"train": [1, 1], "sft": [1, 1], "evaluate": [0, 1]}[verb]
    assert [0 if split is None else len(split) for split in (data.train, data.eval)] == read


def test_generate_gets_every_prompt(run_yaml, training):
    words = ["generate", run_yaml, "--prompt", "--2+2", "--rollout.top_k", "5", "--prompt=b c"]
    assert main(words) == 0
    verb, config, _, problems, greedy = training[0]
    assert (verb, config.rollout.top_k, greedy) == ("generate", 5, False)
    assert [problem.text for problem in problems] == ["--2+2", "b c"]


def test_report_prints_the_pages(tmp_path, monkeypatch, capsys):
    report = types.ModuleType("megatron_rl.observe.report")
    report.write_report = lambda run_dir: run_dir / "report.html"
    comparison = types.ModuleType("megatron_rl.observe.comparison")
    comparison.write_comparison = lambda run_dirs: f"{len(run_dirs)} runs"
    for module in (report, comparison):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    assert main(["report", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'report.html'}\n"
    assert main(["report", str(tmp_path), str(tmp_path / "b")]) == 0
    pages = [tmp_path / "report.html", tmp_path / "b" / "report.html", "2 runs"]
    assert capsys.readouterr().out.splitlines() == list(map(str, pages))


def test_check_prints_sizes_and_starts_nothing(run_yaml, training, capsys):
    words = ["check", run_yaml, "--parallel.expert", "2", "--data.eval", "none.jsonl"]
    assert main([*words, "--world-size", "8"]) == 0
    lines = [
        " ".join(line.split("│")[1:3]).split() for line in capsys.readouterr().out.splitlines()
    ]
    rows = [" ".join(words) for words in lines]
    assert "ranks 8" in rows
    assert "layout data 8, expert 2" in rows
    assert "parameters 1,807,744 (628,096 active for a token)" in rows
    assert "router trace 40 bytes a token over all pipeline stages" in rows
    assert "data.eval none.jsonl (missing)" in rows
    assert "data.train train.jsonl" in rows
    assert training == []
    assert main(words) == 0
    assert "│ 2 " in capsys.readouterr().out  # without --world-size: the fewest ranks that fit


def test_check_for_another_verb(run_yaml, capsys):
    words = ["check", run_yaml, "--world-size=8", "--train.batch_size=6"]
    assert main(words) == 0
    capsys.readouterr()
    assert refusal(capsys, *words, "--for", "sft").startswith("train.batch_size 6 is no multiple")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], f"no verb given; expected one of {', '.join(VERBS)}; see megatron-rl -h"),
        (["trian", "run.yaml"], "argument VERB: invalid choice: 'trian' (choose from "),
        (["train"], "the following arguments are required: CONFIG; see megatron-rl train -h"),
        (["train", "none.yaml"], "config file none.yaml does not exist; expected a YAML file"),
        (["train", "run.yaml", "more"], "unrecognized arguments: more"),
        (["train", "run.yaml", "--seed"], "--seed has no value; expected --seed VALUE"),
        (["train", "run.yaml", "--sed=1"], "unknown key --sed (did you mean seed?)"),
        (["train", "run.yaml", "--prompt", "x"], "unrecognized arguments: --prompt=x"),
        (["train", "run.yaml", "--data.train", "no"], "data.train: no does not exist; expected "),
        (["train", "run.yaml", "--algorithm.name=pso"], "algorithm.name is 'pso'"),
        (
            ["sft", "run.yaml", "--parallel.tensor=2"],
            "found 1 rank; the config's parallel section needs 2; start it with: "
            "torchrun --nproc-per-node 2 -m megatron_rl sft CONFIG",
        ),
        (
            ["generate", "run.yaml"],
            "generate: no prompt given; expected at least one --prompt TEXT",
        ),
        (["generate", "run.yaml", "--prompt"], "argument --prompt: expected one argument"),
        (["check", "run.yaml", "--world-size", "x"], "argument --world-size: invalid int value"),
        (["check", "run.yaml", "--world-size", "0"], "--world-size is 0; expected at least 1"),
        (["report", "runs/x", "--seed", "3"], "report: found --seed; expected only RUN_DIR"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(run_yaml, training, capsys, words, message):
    assert refusal(capsys, *words).startswith(message)
    assert training == []


def test_a_users_error_of_many_lines_is_printed_as_one(run_yaml, training, monkeypatch, capsys):
    def fail(config, data):
        raise UserError("first\nsecond")

    monkeypatch.setattr(sys.modules["megatron_rl.training.run"], "train", fail)
    assert refusal(capsys, "train", run_yaml) == "first second"


def test_a_number_that_is_not_finite_is_one_line_and_exit_code_1(
    run_yaml, training, monkeypatch, capsys
):
    def fail(config, data):
        raise FloatingPointError("the loss is nan")

    monkeypatch.setattr(sys.modules["megatron_rl.training.run"], "train", fail)
    assert main(["train", run_yaml]) == 1
    assert capsys.readouterr().err == "megatron-rl: error: the loss is nan\n"


def test_interruption_is_130_and_other_errors_propagate(run_yaml, training, monkeypatch):
    module = sys.modules["megatron_rl.training.run"]

    def stop(error):
        def fail(config, data):
            raise error

        return fail

    monkeypatch.setattr(module, "train", stop(KeyboardInterrupt()))
    assert main(["train", run_yaml]) == 130
    monkeypatch.setattr(module, "train", stop(RuntimeError("bug")))
    with pytest.raises(RuntimeError, match="bug"):
        main(["train", run_yaml])


@pytest.mark.parametrize(
    ("rank", "waited", "place"), [("0", [], ""), ("1", [PATIENCE_S], "rank 1: ")]
)
def test_the_first_rank_prints_and_another_one_only_if_it_is_still_there_later(
    run_yaml, monkeypatch, capsys, rank, waited, place
):
    for name, value in {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    slept = []
    monkeypatch.setattr("megatron_rl.cli.time.sleep", slept.append)
    error = refusal(capsys, "train", run_yaml, "--parallel.tensor=2", "--parallel.pipeline=2")
    assert error.startswith(f"{place}2 ranks for tensor 2 x pipeline 2")
    assert slept == waited


def test_ranks_of_the_launch_are_checked(run_yaml, training, monkeypatch):
    for name, value in {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    assert main(["train", run_yaml, "--parallel.tensor=2"]) == 0
    assert len(training) == 1


def test_a_broken_launch_is_reported(run_yaml, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "0")
    assert refusal(capsys, "train", run_yaml).startswith("RANK is set and WORLD_SIZE is not")


def test_help_and_version(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"megatron-rl {__version__}\n"
    for verb in VERBS:
        with pytest.raises(SystemExit) as stop:
            main([verb, "-h"])
        assert stop.value.code == 0
        assert f"usage: megatron-rl {verb}" in capsys.readouterr().out


def test_split_overrides_keeps_own_flags_apart():
    words = [
        "check",
        "--a.b",
        "1",
        "run.yaml",
        "--world-size",
        "4",
        "--c=2",
        "-h",
        "--d",
        "--e",
        "5",
    ]
    own, overrides = split_overrides(words)
    assert own == ["check", "run.yaml", "--world-size=4", "-h"]
    assert overrides == ["--a.b", "1", "--c=2", "--d", "--e", "5"]
    assert split_overrides(["train", "x", "--seed", "-1"]) == (["train", "x"], ["--seed", "-1"])


def test_the_command_line_starts_without_heavy_imports():
    """Nothing slow is loaded before the arguments and the config are checked."""
    code = (
        "import sys, megatron_rl.cli, megatron_rl.config.load, megatron_rl.config.checks\n"
        "megatron_rl.cli.main(['train', 'none.yaml'])\n"
        "heavy = "
        "{'torch', 'megatron', 'transformers', 'matplotlib', 'tensorboard', 'rich', 'numpy'}\n"
        "print(sorted(heavy & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "[]\n", done.stderr


def test_python_dash_m_exits_with_the_code(tmp_path):
    command = [sys.executable, "-m", "megatron_rl", "train", str(tmp_path / "none.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2
    expected = f"config file {tmp_path / 'none.yaml'} does not exist; expected a YAML file"
    assert done.stderr == f"megatron-rl: error: {expected}\n"
