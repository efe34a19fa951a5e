"""Paths in the configuration and on the command line: what is filled in, and what is no path."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_rl.cli import main
from megatron_rl.config.fields import is_path, leaf_fields
from megatron_rl.config.load import dump_config, load_config
from megatron_rl.config.schema import Config
from megatron_rl.errors import UserError
from megatron_rl.paths import as_written, local_path


@pytest.fixture(autouse=True)
def environment(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("DATA", "/data/set 1")
    monkeypatch.setenv("AT_HOME", "~/models")
    monkeypatch.setenv("BUCKET", "s3://bucket")
    monkeypatch.setenv("EMPTY", "")
    monkeypatch.delenv("ABSENT", raising=False)
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("a/b", "a/b"),
        ("~", "/home/me"),
        ("~/x.jsonl", "/home/me/x.jsonl"),
        ("a/~/b", "a/~/b"),
        ("./~x", "./~x"),
        ("${DATA}/x", "/data/set 1/x"),
        ("$DATA/x", "/data/set 1/x"),
        ("a${DATA}", "a/data/set 1"),
        ("${AT_HOME}/m", "/home/me/models/m"),
        ("cost$$5/$$DATA", "cost$5/$DATA"),
        ("100$", "100$"),
        ("c:/x", "c:/x"),
        ("a b:c/d", "a b:c/d"),
    ],
)
def test_what_a_path_means(text, path):
    assert local_path("run_dir", text) == path


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "s3://bucket/x",
            "run_dir is 's3://bucket/x', an address; expected a path in the file sys",
        ),
        ("gs://b/x", "run_dir is 'gs://b/x', an address; "),
        ("hf://datasets/x", "run_dir is 'hf://datasets/x', an address; "),
        ("https://h/x", "run_dir is 'https://h/x', an address; "),
        ("${BUCKET}/x", "run_dir is '${BUCKET}/x', an address; "),
        ("s3:/bucket/x", "run_dir is 's3:/bucket/x', an address; "),
        ("${ABSENT}/x", "run_dir is '${ABSENT}/x', and the environment has no variable 'ABSENT'"),
        ("$ABSENT/x", "run_dir is '$ABSENT/x', and the environment has no variable 'ABSENT'"),
        ("${EMPTY}/x", "run_dir is '${EMPTY}/x', and the environment has no variable 'EMPTY', or"),
        ("${}/x", "run_dir is '${}/x', and the environment has no variable ''"),
        ("~nobody-has-this-name/x", "run_dir is '~nobody-has-this-name/x', and there is no such"),
        ("", "run_dir is ''; expected a path"),
        ("a\0b", "run_dir is 'a\\x00b'; expected a path"),
        ("a\ud83db", "run_dir is 'a\\ud83db', which holds no whole characters; expected a path"),
    ],
)
def test_what_is_no_path(text, message):
    with pytest.raises(UserError) as error:
        local_path("run_dir", text)
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


#: Every field that takes a path; a new one has to be added here.
PATHS = [
    *("run_dir", "model.hf_path", "model.hf_config", "data.tokenizer.path", "data.train"),
    *("data.eval", "rollout.servers.python", "rollout.servers.weights_dir"),
    *("checkpoint.init_from", "device.heartbeat_file"),
]


def test_fields_that_take_a_path():
    assert {name for name, field in leaf_fields().items() if is_path(name, field)} >= set(PATHS)
    of_type = {n for n, f in leaf_fields().items() if "Path" in str(f.annotation)}
    assert of_type == set(PATHS) - {"rollout.servers.python"}


@pytest.mark.parametrize("name", PATHS)
def test_every_path_of_the_configuration_refuses_an_address(name):
    with pytest.raises(UserError) as error:
        load_config(None, [f"--{name}", "s3://bucket/x"])
    assert str(error.value).startswith(f"--{name} is 's3://bucket/x', an address; ")


def test_paths_of_the_file_and_the_flags_are_filled_in():
    Path("run.yaml").write_text(
        "run_dir: ~/runs/a\ndata:\n  train: ${DATA}/train.jsonl\n  prompt_key: $DATA ~\n"
    )
    config = load_config(Path("run.yaml"), ["--data.eval=$DATA/eval.jsonl"])
    assert config.run_dir == Path("/home/me/runs/a")
    assert config.data.train == Path("/data/set 1/train.jsonl")
    assert config.data.eval == Path("/data/set 1/eval.jsonl")
    assert config.data.prompt_key == "$DATA ~"  # no path
    python = "--rollout.servers.python"
    assert load_config(None, [python, "~/v/bin/python"]).rollout.servers.python == (
        "/home/me/v/bin/python"
    )
    assert load_config(None, [python, "./python"]).rollout.servers.python == "./python"


def test_a_mistake_names_file_line_and_key():
    Path("run.yaml").write_text("data:\n  train: ${ABSENT}/train.jsonl\n")
    with pytest.raises(UserError) as error:
        load_config(Path("run.yaml"))
    assert str(error.value).startswith(
        "run.yaml:2: data.train is '${ABSENT}/train.jsonl', and the environment has no variable"
    )


@settings(max_examples=25)
@given(st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1))
def test_a_path_survives_dump_and_load(tmp_path_factory, text):
    path = Path(text)
    folder = tmp_path_factory.mktemp("dump")
    if ":/" in str(path):
        return  # an address cannot have got there
    (folder / "run.yaml").write_text(dump_config(Config(run_dir=path)), encoding="utf-8")
    assert load_config(folder / "run.yaml").run_dir == path
    assert Path(local_path("run_dir", as_written(str(path)))) == path


@pytest.mark.parametrize(
    ("words", "name"),
    [
        (["report", "runs/a", "s3://b/c"], "RUN_DIR"),
        (["check", "s3://b/c"], "CONFIG"),
        (["train", "s3://b/c"], "CONFIG"),
        (["convert", "s3://b/c", "x"], "SOURCE"),
        (["convert", "x", "s3://b/c"], "TARGET"),
        (["convert", "x", "y", "--like", "s3://b/c"], "--like"),
        (["convert", "x", "y", "--like=s3://b/c"], "--like"),
    ],
)
def test_the_command_line_takes_no_address(words, name, capsys):
    assert main(words) == 2
    assert f"error: {name} is 's3://b/c', an address; expected a path" in capsys.readouterr().err
    assert list(Path().iterdir()) == []


def test_a_model_that_is_not_there_is_named_by_its_own_key(tmp_path):
    for name, found in {
        "model.hf_path": "--model.hf_path is Qwen/Qwen3-30B-A3B, which is no directory; expected a "
        "Hugging Face model directory on this machine",
        "model.hf_config": "--model.hf_config: Qwen/Qwen3-30B-A3B does not exist; expected a "
        "Hugging Face config.json or its directory",
    }.items():
        with pytest.raises(UserError) as error:
            load_config(None, [f"--{name}", "Qwen/Qwen3-30B-A3B"])
        assert str(error.value).startswith(found)
    (tmp_path / "empty").mkdir()
    for name in ("model.hf_path", "model.hf_config"):
        with pytest.raises(UserError) as error:
            load_config(None, [f"--{name}=empty"])
        assert str(error.value).startswith(f"--{name}: empty/config.json does not exist; expected")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="--model.hf_path is config.json, which is no directory"):
        load_config(None, ["--model.hf_path=config.json"])
