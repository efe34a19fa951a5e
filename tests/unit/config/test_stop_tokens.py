"""At which tokens answers end, as files and configuration say."""

import json

import pytest

from megatron_rl.config.stop_tokens import read_stop_ids, stop_tokens
from megatron_rl.errors import UserError


def write(directory, **files):
    """generation=..., config=...: what the key is in each; those not given are not written."""
    names = {"generation": "generation_config.json", "config": "config.json"}
    for name, value in files.items():
        text = value if isinstance(value, str) else json.dumps({"eos_token_id": value, "x": 1})
        (directory / names[name]).write_text(text, encoding="utf-8")
    return directory


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (
            {"generation": [45, 43], "config": 45},
            {45: "generation_config.json", 43: "generation_config.json"},
        ),
        ({"generation": 43, "config": 45}, {43: "generation_config.json", 45: "config.json"}),
        ({"generation": None, "config": [7]}, {7: "config.json"}),
        ({"generation": "{}", "config": "{}"}, {}),
        ({}, {}),
    ],
)
def test_both_files_name_stop_tokens(tmp_path, files, expected):
    found = read_stop_ids(write(tmp_path, **files))
    assert {token: path.name for token, path in found.items()} == expected
    assert all(path.parent == tmp_path for path in found.values())


@pytest.mark.parametrize("value", [True, -1, 2.0, "</s>", [1, "2"], [[1]], {"a": 1}])
@pytest.mark.parametrize("name", ["generation", "config"])
def test_what_is_no_token_is_refused_with_the_file(tmp_path, name, value):
    text = json.dumps({"eos_token_id": value})
    with pytest.raises(UserError) as refusal:
        read_stop_ids(write(tmp_path, **{name: text}))
    file = {"generation": "generation_config.json", "config": "config.json"}[name]
    assert str(refusal.value) == (
        f"{tmp_path / file}: eos_token_id is {json.dumps(value)}; expected a token id, a list of "
        "them or null; correct the file"
    )


@pytest.mark.parametrize("text", ["", "[1]", '{"eos_token_id": 1', "\ud83d", "[" * 100_000])
def test_a_damaged_file_is_refused(tmp_path, text):
    (tmp_path / "generation_config.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(UserError, match="generation_config.json.* expected a JSON object"):
        read_stop_ids(tmp_path)


def test_the_set_is_that_of_tokenizer_files_and_configuration(tmp_path):
    write(tmp_path, generation=[45, 43], config=45)
    assert stop_tokens(45, [tmp_path], {9: "rollout.stop_tokens", 43: "rollout"}, 64) == {
        45: "tokenizer",
        43: "generation_config.json",
        9: "rollout.stop_tokens",
    }
    assert stop_tokens(2, [], {}, 3) == {2: "tokenizer"}


@pytest.mark.parametrize(
    ("eos", "more", "size", "place"),
    [
        (1, {64: "rollout.stop_token_ids"}, 64, "rollout.stop_token_ids names the token 64"),
        (1, {}, 43, "generation_config.json: eos_token_id names the token 43"),
        (50, {}, 44, "the tokenizer's end-of-sequence token names the token 50"),
    ],
)
def test_a_stop_token_outside_the_vocabulary_is_refused_by_name(tmp_path, eos, more, size, place):
    write(tmp_path, generation=[43])
    with pytest.raises(UserError, match=f"{place}; expected ids below model.vocab_size {size}; "):
        stop_tokens(eos, [tmp_path], more, size)
