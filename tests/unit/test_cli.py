"""The command line: exit codes, one-line errors, dispatch and a start without heavy imports."""

import os
import re
import socket
import subprocess
import sys
import types
from pathlib import Path

import pytest

from megatron_rl import __version__
from megatron_rl.arguments import VERBS, split_overrides
from megatron_rl.cli import PATIENCE_S, main
from megatron_rl.errors import UserError
from tests.support.chat_tokenizers import save_qwen
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
    """Stands in for megatron_rl.run.verbs and records the calls."""
    calls = []
    module = types.ModuleType("megatron_rl.run.verbs")
    for verb in ("train", "sft"):
        setattr(module, verb, lambda config, data, verb=verb: calls.append((verb, config, data)))
    module.evaluate = lambda config, data, base: calls.append(("evaluate", config, data, base))
    module.generate = lambda config, data, problems, greedy, base, samples, output: calls.append(
        ("generate", config, data, problems, greedy, samples, output, base)
    )
    device = types.ModuleType("megatron_rl.device.select")
    device.select_device = lambda config, launch: None
    monkeypatch.setitem(sys.modules, "megatron_rl.device.select", device)
    monkeypatch.setitem(sys.modules, "megatron_rl.run.verbs", module)
    monkeypatch.setattr("megatron_rl.run.verbs", module, raising=False)
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
    verb, config, _, problems, *how = training[0]
    assert (verb, config.rollout.top_k, *how) == ("generate", 5, False, 1, None, False)
    assert [problem.text for problem in problems] == ["--2+2", "b c"]


def test_generate_reads_prompts_as_data_sets_are_read(run_yaml, training, capsys):
    Path("prompts.csv").write_text("question,n\n2+2,2\n" + "3" * 300 + ",3\n3+3,4\n")
    words = ["generate", run_yaml, "--prompts", "prompts.csv", "--data.template", "{question}="]
    more = ["--samples", "3", "--output", "answers.jsonl", "--data.overlong", "skip"]
    assert main([*words, *more]) == 0
    *_, problems, greedy, samples, output, _ = training[0]
    assert [(p.index, p.text) for p in problems] == [(0, "2+2="), (2, "3+3=")]
    assert (greedy, samples, output) == (False, 3, Path("answers.jsonl"))
    skipped = "1 of 3 lines skipped, longer than 192 tokens: the first is row 2 with "
    assert skipped in capsys.readouterr().err
    assert refusal(capsys, *words).startswith("prompts.csv, row 2: prompt of ")


def test_the_base_model_is_asked_for_by_name(run_yaml, training):
    assert main(["evaluate", run_yaml]) == 0
    assert main(["evaluate", "--base", run_yaml, "--seed", "5"]) == 0
    assert main(["generate", run_yaml, "--prompt", "a", "--base"]) == 0
    assert [(call[0], call[-1]) for call in training] == [
        ("evaluate", False),
        ("evaluate", True),
        ("generate", True),
    ]
    assert main(["train", run_yaml, "--base"]) == 2


def test_preflight_takes_the_words_of_evaluate(run_yaml, capsys):
    """As tools/launch/torchrun.sh hands them on; it gets as far as the address."""
    words = ["--base", "--for=evaluate", "--nodes=2", "--node=0", "--ranks-per-node=1", "--meet=x"]
    assert refusal(capsys, "preflight", run_yaml, *words).startswith(
        "--meet is 'x'; expected HOST:PORT"
    )


def test_generate_greedily_and_in_chat_form(run_yaml, training, capsys):
    assert main(["generate", run_yaml, "--greedy", "--prompt", "2+2"]) == 0
    assert training[0][4] is True
    words = ["generate", run_yaml, "--chat", "--prompt", "2+2"]
    assert refusal(capsys, *words).startswith("data.chat is template and the tokenizer has no chat")
    save_qwen(Path("qwen"))
    huggingface = ["--data.tokenizer.kind", "huggingface", "--data.tokenizer.path", "qwen"]
    assert main([*words, *huggingface, "--model.vocab_size=512"]) == 0
    _, config, _, problems, greedy, *_ = training[1]
    turn = "<|im_start|>user\n2+2<|im_end|>\n<|im_start|>assistant\n"
    assert ([problem.text for problem in problems], greedy) == ([turn], False)
    words[-1] = '[{"role": "user", "content": "2+2"}]'
    assert main([*words, *huggingface, "--model.vocab_size=512"]) == 0
    assert training[2][3][0].text == turn


def test_report_prints_the_pages(tmp_path, monkeypatch, capsys):
    verb = "megatron_rl.report.verb"
    monkeypatch.setattr(f"{verb}.write_report", lambda run_dir: run_dir / "report.html")
    monkeypatch.setattr(f"{verb}.write_comparison", lambda run_dirs: f"{len(run_dirs)} runs")
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
    assert "train 1 problems, prompts of 7 to 7 tokens (50%: 7, 90%: 7," in rows
    assert "prompts text as it stands (data.chat auto)" in rows
    assert training == []
    assert main(words) == 0
    assert "│ 2 " in capsys.readouterr().out  # without --world-size: the fewest ranks that fit


def test_check_refuses_the_data_that_a_run_would(run_yaml, capsys):
    lacking = PROBLEM.replace("target", "aim")
    Path("train.jsonl").write_text(f"{PROBLEM}\n{lacking}\n")
    said = "train.jsonl, line 2: record with aim, completion, numbers, prompt; the verifier 'count"
    for verb in ("check", "train", "data"):
        assert refusal(capsys, verb, run_yaml).startswith(said)
    # Without a tokenizer the lines are checked all the same.
    gone = ("--data.tokenizer.path", "none.model")
    assert refusal(capsys, "check", run_yaml, *gone).startswith(said)
    assert main(["check", run_yaml, *gone, "--for", "sft"]) == 0
    assert "│   train              │ 2 lines" in capsys.readouterr().out


def test_check_and_runs_say_what_confines_programs(run_yaml, training, capsys, monkeypatch):
    code = '{"prompt": "def f():\\n", "tests": "assert f() == 1", "entry_point": "f"}'
    for name in ("train.jsonl", "eval.jsonl"):
        Path(name).write_text(code + "\n")

    def shown(*words):
        assert main(["check", run_yaml, *words]) == 0
        rows = [line.split("│")[1:3] for line in capsys.readouterr().out.splitlines()]
        return {row[0].strip(): row[1].strip() for row in rows if len(row) == 2}

    of_code = ("--reward.name", "code")
    monkeypatch.setattr("megatron_rl.rewards.check_sandbox", lambda: {"sandbox": "Landlock 7"})
    assert shown(*of_code)["sandbox"] == "Landlock 7"
    assert "sandbox" not in shown(*of_code, "--for", "generate")
    assert main(["train", run_yaml, *of_code]) == 0
    assert training[0][2].machine == {"sandbox": "Landlock 7"}

    def lacking():
        raise UserError("no seccomp")

    monkeypatch.setattr("megatron_rl.rewards.check_sandbox", lacking)
    assert shown(*of_code)["this machine"] == "would be refused: no seccomp"
    assert refusal(capsys, "train", run_yaml, *of_code) == "no seccomp"


def test_check_says_that_bf16_is_slow_where_it_is(run_yaml, training, capsys, monkeypatch):
    from megatron_rl.device import instructions

    for there, kind, said in ((False, "cpu", 1), (False, "cuda", 0), (True, "cpu", 0)):
        monkeypatch.setattr(instructions, "has_bf16", lambda root, there=there: there)
        words = ["check", run_yaml, "--model.dtype", "bf16", "--device.kind", kind]
        assert main(words) == 0
        assert capsys.readouterr().out.count("slow without a GPU") == said
        assert main(["check", run_yaml, "--device.kind", kind]) == 0
        assert "slow without a GPU" not in capsys.readouterr().out


def test_data_shows_what_the_model_sees(run_yaml, capsys):
    assert main(["data", run_yaml, "--for", "sft", "--examples", "1"]) == 0
    ids = {"<s>": 2, "</s>": 3}
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "an answer ends with: 3:'</s>' (tokenizer)"
    assert lines[1] == "prompts: text as it stands (data.chat auto)"
    assert lines[3] == (
        "data.train: train.jsonl, 1 samples, prompts of 7 to 7 tokens (50%: 7, 90%: 7, 99%: 7), "
        "answers of 4 to 4 tokens (50%: 4, 90%: 4, 99%: 4)"
    )
    assert lines[5:7] == [
        "a prompt of 7 tokens; trained on: the 4 after it, marked *",
        "  | <s>3 4=7:3+4</s>",
    ]
    tokens = re.findall(r"(\*?)(\d+):'([^']+)'", lines[7])
    assert [piece for _, _, piece in tokens] == ["<s>", *"3 4=7:", *"3+4", "</s>"]
    assert [mark for mark, _, _ in tokens] == [""] * 7 + ["*"] * 4
    assert {piece: int(token) for _, token, piece in tokens}.items() >= ids.items()
    assert lines[9].startswith("data.eval: eval.jsonl, 1 problems, prompts of 7 to 7 tokens")
    assert refusal(capsys, "data", run_yaml, "--examples", "-1").startswith("--examples is -1; exp")
    gone = ("--data.train", "null", "--data.eval", "null")
    assert refusal(capsys, "data", run_yaml, *gone).startswith("neither data.train nor data.eval")


def test_data_is_read_before_torch_is_imported(run_yaml):
    """A mistake in it costs no seconds; nor does reading it with a SentencePiece tokenizer."""
    code = (
        "import sys, megatron_rl.cli\n"
        "codes = [megatron_rl.cli.main([*words, 'run.yaml']) for words in (['data'], ['train'])]\n"
        "print(codes, sorted({'torch', 'megatron', 'transformers'} & set(sys.modules)))\n"
    )
    Path("train.jsonl").write_text(PROBLEM.replace('"target": 7', '"target": "7"'))
    done = subprocess.run(
        [sys.executable, "-c", code.replace("['data']", "['data', '--data.train=null']")],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.stdout.splitlines()[-1] == "[0, 2] []", done.stderr
    expected = "megatron-rl: error: train.jsonl, line 1: target '7'; the verifier 'countdown' ex"
    assert done.stderr.startswith(expected)


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
            "generate: no prompt given; expected at least one --prompt TEXT, or --prompts FILE",
        ),
        (
            ["generate", "run.yaml", "--prompt", "a", "--prompts", "b"],
            "generate: both --prompt and --prompts given; expected at least one --prompt TEXT, or "
            "--prompts FILE",
        ),
        (
            ["generate", "run.yaml", "--prompt", "a", "--samples", "0"],
            "--samples is 0; expected at least 1",
        ),
        (
            ["generate", "run.yaml", "--prompt", "a", "--samples", "2", "--greedy"],
            "--samples 2 with --greedy, by which all answers to a prompt are the same",
        ),
        (["generate", "run.yaml", "--prompt"], "argument --prompt: expected one argument"),
        (["check", "run.yaml", "--world-size", "x"], "--world-size is 'x'; expected a whole"),
        (["check", "run.yaml", "--world-size", "9" * 5000], "--world-size is '999"),
        (["data", "run.yaml", "--examples", "9" * 400], "--examples is '999"),
        (["convert", "a", "b", "--shard-gib", "1e999"], "--shard-gib is '1e999'; expected a num"),
        (["convert", "a", "b", "--shard-gib", "nan"], "--shard-gib is 'nan'; expected a number"),
        (["train", "run.yaml", "--seed", "9" * 5000], "--seed: '999"),
        (["train", "run.yaml", "--seed", "9" * 301], "--seed: '999"),
        (["train", "run.yaml", "--algorithm.settings", "{a: 1, a: 2}"], "--algorithm.settings: "),
        (["train", "run.yaml", "--rollout.temperature", "1e999"], "--rollout.temperature: '1e9"),
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

    monkeypatch.setattr(sys.modules["megatron_rl.run.verbs"], "train", fail)
    assert refusal(capsys, "train", run_yaml) == "first second"


def test_a_number_that_is_not_finite_is_one_line_and_exit_code_1(
    run_yaml, training, monkeypatch, capsys
):
    def fail(config, data):
        raise FloatingPointError("the loss is nan")

    monkeypatch.setattr(sys.modules["megatron_rl.run.verbs"], "train", fail)
    assert main(["train", run_yaml]) == 1
    assert capsys.readouterr().err == "megatron-rl: error: the loss is nan\n"


def test_interruption_is_130_and_other_errors_propagate(run_yaml, training, monkeypatch):
    module = sys.modules["megatron_rl.run.verbs"]

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
        "{'torch', 'megatron', 'transformers', 'tensorboard', 'rich', 'numpy'}\n"
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


def test_output_on_a_full_disk_is_one_line_and_decides_nothing_else(run_yaml, monkeypatch, capsys):
    with open("/dev/full", "w") as full:  # closing it would fail, were anything left in it
        monkeypatch.setattr(sys, "stdout", full)
        assert main(["check", run_yaml]) == 1
    assert capsys.readouterr().err == (
        "megatron-rl: error: the machine reports: No space left on device; correct it and start "
        "again\n"
    )


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"--meet": "node0"}, "--meet is 'node0'; expected HOST:PORT, such as node0:29500"),
        ({"--meet": "node0:99999"}, "--meet is 'node0:99999'; expected HOST:PORT"),
        ({"--meet": "::1"}, "--meet is '::1'; expected HOST:PORT"),
        ({"--meet": "2001:db8::5"}, "--meet is '2001:db8::5'; expected HOST:PORT"),
        ({"--node": "2"}, "--node is 2 with --nodes 2; expected 0 to N - 1"),
        ({"--ranks-per-node": "0"}, "--ranks-per-node is 0; expected at least 1"),
        ({"--within": "nan"}, "--within is 'nan'; expected a number"),
        ({"--within": "-1"}, "--within is -1; expected seconds, above 0"),
    ],
)
def test_a_preflight_of_impossible_nodes_is_refused(run_yaml, capsys, changed, message):
    words = {"--nodes": "2", "--node": "0", "--ranks-per-node": "1", "--meet": "node0:29501"}
    pairs = [f"{name}={value}" for name, value in (words | changed).items()]
    assert refusal(capsys, "preflight", run_yaml, *pairs).startswith(message)


def test_a_preflight_names_the_nodes_that_are_missing_and_may_be_tried_again(
    run_yaml, capsys, tmp_path
):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ["--nodes=2", "--node=0", "--ranks-per-node=1", f"--meet=127.0.0.1:{port}"]
    assert main(["preflight", run_yaml, *words, "--within=0.5"]) == 1
    first, error = capsys.readouterr().err.splitlines()
    assert first == "preflight: node 1 has not answered within 0.5 s"
    assert error.startswith("megatron-rl: error: preflight misses 1 of 2 nodes, see above; expect")
