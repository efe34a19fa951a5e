"""What a run keeps of the model it started from, and at which tokens its answers end."""

import errno
import json
import os
from pathlib import Path

import pytest

from megatron_rl.weights.side_files import keep_side_files, kept_side_files, run_of


def model_directory(folder, generation=None, config=1):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"eos_token_id": config}))
    (folder / "tokenizer.json").write_text("{}")
    if generation is not None:
        (folder / "generation_config.json").write_text(generation)
    return folder


def stops_kept(run_dir):
    return json.loads((run_dir / "hf" / "generation_config.json").read_text())


def full(descriptor):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.fixture
def run_dir(tmp_path):
    (tmp_path / "run").mkdir()
    return tmp_path / "run"


def test_files_that_say_it_already_are_kept_verbatim(tmp_path, run_dir):
    text = '{"eos_token_id": [7,  1], "temperature": 0.6}'
    source = model_directory(tmp_path / "model", text)
    keep_side_files(source, run_dir, (1, 7))
    for name in ("config.json", "tokenizer.json", "generation_config.json"):
        assert (run_dir / "hf" / name).read_bytes() == (source / name).read_bytes()


def test_files_of_others_are_never_written_through_a_link(tmp_path, run_dir):
    source, other = model_directory(tmp_path / "model"), tmp_path / "other.json"
    other.write_text("precious")
    (run_dir / "hf").mkdir()
    (run_dir / "hf" / "config.json").symlink_to(other)
    (run_dir / "hf" / "tokenizer.json").symlink_to(source / "tokenizer.json")
    keep_side_files(source, run_dir)
    assert other.read_text() == "precious"
    for name in ("config.json", "tokenizer.json"):
        assert (run_dir / "hf" / name).read_bytes() == (source / name).read_bytes()
        assert not (run_dir / "hf" / name).is_symlink()


def test_stop_tokens_of_the_run_are_added(tmp_path, run_dir):
    source = model_directory(tmp_path / "model", '{"eos_token_id": [7, 1], "temperature": 0.6}')
    for _ in range(2):  # a run that is continued
        keep_side_files(source, run_dir, (1, 7, 9))
        assert stops_kept(run_dir) == {"eos_token_id": [7, 1, 9], "temperature": 0.6}
    keep_side_files(source, run_dir, (1, 7))
    assert stops_kept(run_dir)["eos_token_id"] == [7, 1]


def test_a_run_that_goes_on_with_fewer_stop_tokens_keeps_those_alone(
    tmp_path, run_dir, monkeypatch
):
    """Its own folder is the source then."""
    source = model_directory(tmp_path / "model", '{"eos_token_id": [7, 1], "temperature": 0.6}')
    keep_side_files(source, run_dir, (1, 7, 9))
    kept = kept_side_files(run_dir)
    keep_side_files(kept, run_dir, (1, 7))
    assert stops_kept(run_dir) == {"eos_token_id": [7, 1], "temperature": 0.6}
    monkeypatch.setattr(os, "fsync", full)  # a disk that is full leaves what was there
    with pytest.raises(OSError, match="No space left"):
        keep_side_files(kept, run_dir, (1, 8))
    assert stops_kept(run_dir)["eos_token_id"] == [7, 1]


def test_without_a_generation_config_those_of_the_config_are_among_them(tmp_path, run_dir):
    source = model_directory(tmp_path / "model", config=1)
    keep_side_files(source, run_dir, (1,))
    assert not (run_dir / "hf" / "generation_config.json").exists()
    keep_side_files(source, run_dir, (2, 1))
    assert stops_kept(run_dir) == {"eos_token_id": [1, 2]}


def test_a_run_from_no_model_directory_keeps_its_stop_tokens(run_dir):
    for stops in ((3, 5), (3,)):
        keep_side_files(None, run_dir, stops)
        assert stops_kept(run_dir) == {"eos_token_id": list(stops)}
    assert kept_side_files(run_dir) == run_dir / "hf"


def test_the_next_run_keeps_what_this_one_kept(tmp_path, run_dir):
    keep_side_files(model_directory(tmp_path / "model", '{"eos_token_id": 1}'), run_dir, (1, 4))
    after = tmp_path / "after"
    after.mkdir()
    keep_side_files(kept_side_files(run_dir), after, (1, 4))
    names = {path.name for path in (after / "hf").iterdir()}
    assert names == {"config.json", "tokenizer.json", "generation_config.json"}
    assert stops_kept(after) == {"eos_token_id": [1, 4]}
    keep_side_files(kept_side_files(after), after, (1, 4))  # a run that starts from itself
    assert stops_kept(after) == {"eos_token_id": [1, 4]}


@pytest.mark.parametrize("place", ["", "checkpoints", "checkpoints/step_5", "../run/checkpoints"])
def test_a_run_is_found_from_its_checkpoints(run_dir, place):
    assert run_of(Path(run_dir / place)) == run_dir


def test_transformers_stops_there(tmp_path, run_dir):
    from transformers import GenerationConfig

    keep_side_files(None, run_dir, (3, 5))
    read = GenerationConfig.from_pretrained(run_dir / "hf")  # it holds no code
    assert read.eos_token_id == [3, 5]
