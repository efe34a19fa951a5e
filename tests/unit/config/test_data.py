"""The section data: one data set or several, with paths filled in; mistakes name their place."""

import json
from pathlib import Path

import pytest

from megatron_rl.config.checks import check_config
from megatron_rl.config.data import chosen_sources, data_text
from megatron_rl.config.load import dump_config, load_config
from megatron_rl.config.on_resume import changes
from megatron_rl.config.schema_data import DataConfig
from megatron_rl.errors import UserError


@pytest.fixture
def load(tmp_path, monkeypatch):
    """Load YAML text from run.yaml in the current directory, with overrides."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DATA", str(tmp_path / "data"))

    def load_text(text="", *overrides):
        Path("run.yaml").write_text(text, encoding="utf-8")
        return load_config(Path("run.yaml"), overrides)

    return load_text


MIXED = """
data:
  template: "{question}"
  train:
    - {path: "${DATA}/a.jsonl", weight: 3}
    - {path: "~/b$$.csv", label: own, prompt_key: p, settings: {json_columns: [n]}}
    - {path: hf:org/Name@main/train}
"""


def test_several_data_sets(load, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    config = load(MIXED)
    first, second, third = config.data.train
    assert (first.path, second.path) == (tmp_path / "data/a.jsonl", Path("/home/me/b$.csv"))
    assert (first.weight, second.weight, second.settings) == (3.0, 1.0, {"json_columns": ["n"]})
    assert load(dump_config(config)) == config
    sources = chosen_sources(config.data, "train")
    assert [source.label for source in sources] == ["a", "own", "name"]
    assert [source.columns.template for source in sources] == ["{question}", None, "{question}"]
    assert [source.columns.prompt_key for source in sources] == ["prompt", "p", "prompt"]
    assert [source.pieces[0].row.name for source in sources] == ["jsonl", "csv", "hub"]
    assert data_text(config.data.train).startswith(f"0.6 {tmp_path}/data/a.jsonl + 0.2 /home")
    assert chosen_sources(config.data, "eval") == ()


def test_one_is_written_as_before(load):
    for text in ("a.jsonl", "2024", "hf:org/name", "./mine.py:thing", "a: b"):
        assert load("", "--data.train", text).data.train == Path(text)
    assert load("data: {train: a.jsonl}").data.train == Path("a.jsonl")
    assert load("", "--data.train", "[{path: a.jsonl}]").data.train[0].path == Path("a.jsonl")
    assert data_text(Path("a.jsonl")) == "a.jsonl"


def test_parts_of_one_name_are_told_apart():
    parts = [{"path": path} for path in ("a/train.jsonl", "b/train.csv", "3/1.csv", "x.y/é.csv")]
    labels = [s.label for s in chosen_sources(DataConfig(train=parts), "train")]
    assert labels == ["train", "train_2", "data_1", "data"]
    with pytest.raises(
        UserError, match=r"data.train.1.label is 'a' as another is; expected a name"
    ):
        chosen_sources(DataConfig(train=[{"path": "a.csv"}, {"path": "b", "label": "a"}]), "train")


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ("[{path: a, weight: 0}]", "run.yaml:2: data.train.0.weight is 0; Input should be greater"),
        (
            "[{path: a}, {paht: b}]",
            'data.train.1.path is {"paht": "b"}; Field required; correct it',
        ),
        ("[{path: a, prompt: b}]", 'data.train.0.prompt is "b"; Extra inputs are not permitted'),
        (
            "[a.jsonl]",
            'data.train is ["a.jsonl"]; expected a path or a list, each a mapping of path',
        ),
        ("{path: a}", 'data.train is {"path": "a"}; expected a path or a list, each a mapping of'),
        ("7", "data.train is 7; expected a path or a list"),
        ("[{path: 's3://a/b'}]", "data.train.0.path is 's3://a/b', an address; expected a path"),
        ("[{path: '${NO_SUCH}/a'}]", "and the environment has no variable 'NO_SUCH'"),
    ],
)
def test_mistakes_name_their_place(load, train, message):
    with pytest.raises(UserError) as error:
        load(f"data:\n  train: {train}\n")
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_part_that_is_not_there(load, tmp_path):
    (tmp_path / "a.jsonl").write_text("{}")
    (tmp_path / "t.model").write_text("")
    text = "data: {tokenizer: {path: t.model}, train: [{path: a.jsonl}, {path: b.jsonl}]}"
    with pytest.raises(UserError, match=r"data.train.1: b.jsonl does not exist; expected a path"):
        check_config(load(text), 1, "train")
    with pytest.raises(UserError, match=r"data.train is not given; expected a path, which train"):
        check_config(load("data: {tokenizer: {path: t.model}}"), 1, "train")
    check_config(load(text, "--data.train", "hf:org/name"), 1, "train")


def test_a_change_on_resuming_is_said(load):
    before, after = load(MIXED), load(MIXED.replace("weight: 3", "weight: 2"))
    (change,) = changes(*(json.loads(one.model_dump_json()) for one in (before, after)))
    assert change.key == "data.train" and "2.0" in str(change)
