"""What a run reads is part of what it is: changed content makes another run."""

import hashlib
import os
from pathlib import Path

import pytest

from megatron_rl.config.load import load_config
from megatron_rl.errors import UserError
from megatron_rl.study.contents import contents_of
from megatron_rl.study.plan import make_plan
from megatron_rl.study.schema import read_study
from tests.support.stand_in_study import lay_out

ARMS = "arms: {a: {}}\nseeds: 1\n"


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def digest(more=""):
    lay_out_once = Path("study.yaml")
    lay_out_once.write_text(f"study_dir: out\nbase: base.yaml\n{ARMS}{more}")
    return make_plan(read_study(lay_out_once)).runs[-1].digest


def replace(path, text):
    """New content, at a later time of the file's clock."""
    path.write_text(text)
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))


@pytest.mark.parametrize("name", ["train.jsonl", "tokenizer.model"])
def test_another_content_is_another_run_and_the_old_content_the_old_run(folder, name):
    lay_out(folder, ARMS)
    before = digest()
    replace(folder / name, '{"prompt": "1"}\n')
    after = digest()
    assert after != before
    replace(folder / name, '{"prompt": "2"}\n')  # as long
    assert digest() not in (before, after)
    replace(folder / name, "")
    assert digest() == before
    os.utime(folder / name)
    assert digest() == before  # its time does not count


def test_so_does_a_files_code_but_not_that_of_the_package(folder):
    lay_out(folder, ARMS)
    own = folder / "mine.py"
    own.write_text("def mine(record, completion):\n    return None\n")
    reward = "overrides: {reward.name: './mine.py:mine'}\n"
    before = digest(reward)
    replace(own, "def mine(record, completion):\n    return 1.0\n")
    assert digest(reward) != before
    found = contents_of(load_config(None, ["--reward.name", "./mine.py:mine"]), "train")
    assert found["./mine.py:mine"] == hashlib.sha256(own.read_bytes()).hexdigest()


def test_a_directory_counts_by_every_file_weights_by_size_and_beginning(folder):
    model = folder / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    weights = model / "model.safetensors"
    weights.write_bytes(b"a" * (1 << 22) + b"b")

    def of():
        config = load_config(None, ["--data.tokenizer.path", "model"])
        return contents_of(config, "train")["data.tokenizer.path"]

    known = [of()]
    for path, content in (
        (model / "config.json", b"[]"),
        (weights, b"c" + b"a" * ((1 << 22) - 1) + b"b"),
        (weights, b"c" + b"a" * ((1 << 22) - 1) + b"bb"),
        (model / "chat_template.jinja", b""),
    ):
        path.write_bytes(content)
        os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))
        assert of() not in known
        known.append(of())


def test_start_weights_count_by_the_manifest_of_the_newest_checkpoint(folder):
    lay_out(folder, ARMS)
    for step in (9, 10):
        (folder / f"old/checkpoints/step_{step}").mkdir(parents=True)
        (folder / f"old/checkpoints/step_{step}/manifest.json").write_text(f"{step}")
    start = "overrides: {checkpoint.init_from: old}\n"
    before = digest(start)
    replace(folder / "old/checkpoints/step_9/manifest.json", "other")
    assert digest(start) == before
    (folder / "old/metrics.jsonl").touch()
    assert digest(start) == before
    replace(folder / "old/checkpoints/step_10/manifest.json", "other")
    assert digest(start) != before


def test_start_weights_are_those_that_a_run_would_load(folder):
    """After resuming from an older step: ``latest`` names it, and newer ones are still there."""
    lay_out(folder, ARMS)
    for step in (9, 10):
        (folder / f"old/checkpoints/step_{step}").mkdir(parents=True)
        (folder / f"old/checkpoints/step_{step}/manifest.json").write_text(f"{step}")
    (folder / "old/checkpoints/latest").write_text("step_9\n")
    found = contents_of(load_config(None, ["--checkpoint.init_from", "old"]), "train")
    bytes_and_content = hashlib.sha256(b"1 9").hexdigest()
    assert found["checkpoint.init_from"] == bytes_and_content


def test_files_beside_a_tokenizer_json_count(folder):
    (folder / "tokenizer.json").write_text("{}")
    config = load_config(None, ["--data.tokenizer.path", "tokenizer.json"])
    before = contents_of(config, "train")
    (folder / "chat_template.jinja").write_text("a")
    after = contents_of(config, "train")
    assert after.keys() - before.keys() == {"data.tokenizer.chat_template.jinja"}


def test_a_prepared_run_that_is_there_counts_as_one_that_is_not_yet(folder):
    lay_out(folder, ARMS)
    prepared = "prepare: {warm: {config: base.yaml}}\nstart_from: warm\n"
    before = digest(prepared)
    made = make_plan(read_study(Path("study.yaml"))).runs[0].run_dir
    (made / "checkpoints/step_6").mkdir(parents=True)
    (made / "checkpoints/step_6/manifest.json").write_text("6")
    assert digest(prepared) == before
    replace(folder / "train.jsonl", "{}")  # of the prepared run as well
    assert digest(prepared) != before


def test_a_device_is_refused(folder):
    """It would be read for ever."""
    lay_out(folder, ARMS)
    with pytest.raises(UserError, match=r"/dev/zero cannot be read \(not a regular file\); expect"):
        digest("overrides: {data.tokenizer.path: /dev/zero}\n")


def test_a_file_that_cannot_be_read_is_one_line(folder, monkeypatch):
    lay_out(folder, ARMS)

    opened = Path.open

    def refuse(self, *args, **more):
        if self.name == "train.jsonl":
            raise PermissionError(13, "Permission denied", str(self))
        return opened(self, *args, **more)

    replace(folder / "train.jsonl", "never read before")
    config = load_config(Path("base.yaml"))
    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(UserError, match=r"^data\.train: train\.jsonl cannot be read \(Permission"):
        contents_of(config, "train")
