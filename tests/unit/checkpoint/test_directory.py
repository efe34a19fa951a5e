"""Checkpoint directories: which one is the newest, and what is left after saving or a kill."""

import os

import pytest

from megatron_rl.checkpoint import directory
from megatron_rl.checkpoint.directory import (
    begin,
    complete_checkpoints,
    find_checkpoint,
    newest_checkpoint,
    publish,
)
from megatron_rl.checkpoint.manifest import Manifest, write_manifest
from megatron_rl.errors import UserError


def make(root, name, content="{}"):
    """A directory that counts as a complete checkpoint."""
    path = root / name
    path.mkdir(parents=True)
    (path / "manifest.json").write_text(content)
    return path


def save(root, step, keep=2, content="{}"):
    """What saving does to the directory."""
    partial = begin(root, step)
    (partial / "manifest.json").write_text(content)
    return publish(root, step, keep)


def names(root):
    return sorted(path.name for path in root.iterdir())


def test_newest_is_the_one_that_latest_names(tmp_path):
    for step in (3, 9, 10):
        make(tmp_path, f"step_{step}")
    (tmp_path / "latest").write_text("step_9\n")
    assert newest_checkpoint(tmp_path) == tmp_path / "step_9"


@pytest.mark.parametrize("pointer", [None, b"step_11\n", b"step_12\n", b"rubbish", b"\xff\xfe"])
def test_without_a_valid_pointer_the_highest_complete_step_is_newest(tmp_path, pointer):
    for step in (2, 9, 10):
        make(tmp_path, f"step_{step}")
    (tmp_path / "step_11").mkdir()  # no manifest
    if pointer is not None:
        (tmp_path / "latest").write_bytes(pointer)
    assert newest_checkpoint(tmp_path) == tmp_path / "step_10"


@pytest.mark.parametrize(
    "what", ["pipe", "directory", "loop", "device", "long", "digits", "script"]
)
def test_a_pointer_that_is_none_is_not_waited_for(tmp_path, what):
    for step in (2, 3):
        make(tmp_path, f"step_{step}")
    latest = tmp_path / "latest"
    if what == "pipe":
        os.mkfifo(latest)
    elif what == "directory":
        latest.mkdir()
    elif what in ("loop", "device"):
        latest.symlink_to(latest if what == "loop" else "/dev/zero")
    else:
        said = {"long": "step_2" + " " * 2**20, "digits": "step_" + "9" * 5000, "script": "step_٢"}
        latest.write_text(said[what])
    assert newest_checkpoint(tmp_path) == tmp_path / "step_3"


def test_there_is_no_newest_without_a_complete_one(tmp_path):
    assert newest_checkpoint(tmp_path / "missing") is None
    (tmp_path / "step_1").mkdir()
    make(tmp_path, ".step_2.partial")
    make(tmp_path, ".step_3.deleted")
    (tmp_path / "latest").write_text("step_1")
    assert newest_checkpoint(tmp_path) is None


def test_a_run_its_checkpoints_and_a_step_lead_to_the_same_checkpoint(tmp_path):
    root = tmp_path / "checkpoints"
    older, newer = make(root, "step_1"), make(root, "step_2")
    assert find_checkpoint(tmp_path) == newer
    assert find_checkpoint(root) == newer
    assert find_checkpoint(older) == older


@pytest.mark.parametrize("exists, words", [(True, "no complete"), (False, "does not exist")])
def test_a_path_without_checkpoint_is_refused(tmp_path, exists, words):
    path = tmp_path / "run"
    if exists:
        path.mkdir()
    with pytest.raises(UserError, match=f"{path} .*{words}.*; expected .*; check the path"):
        find_checkpoint(path)


def test_only_the_newest_are_kept(tmp_path):
    for step in (1, 2, 9, 10, 11):
        save(tmp_path, step, keep=3)
    assert names(tmp_path) == ["latest", "step_10", "step_11", "step_9"]
    assert (tmp_path / "latest").read_text() == "step_11\n"
    save(tmp_path, 12, keep=1)
    assert names(tmp_path) == ["latest", "step_12"]


def test_the_best_are_kept_beside_the_newest(tmp_path):
    scores = {1: 0.2, 2: 0.9, 3: None, 4: 0.5, 5: 0.5, 6: 0.1, 7: None}
    for step, score in scores.items():
        partial = begin(tmp_path, step)
        write_manifest(partial, Manifest(step, {}, {}, None, {}, {}, score))
        publish(tmp_path, step, 2, keep_best=2)
    assert names(tmp_path) == ["latest", "step_2", "step_5", "step_6", "step_7"]
    assert newest_checkpoint(tmp_path).name == "step_7"
    make(tmp_path, "step_8", "no manifest")  # damaged: it has no score
    save(tmp_path, 9)  # and without keep_best they go
    assert names(tmp_path) == ["latest", "step_8", "step_9"]


def test_the_one_just_saved_is_kept_even_if_others_have_higher_steps(tmp_path):
    for step in (8, 9):
        save(tmp_path, step)
    save(tmp_path, 5)
    assert names(tmp_path) == ["latest", "step_5", "step_9"]
    assert newest_checkpoint(tmp_path).name == "step_5"


def test_a_step_saved_again_replaces_the_old_one(tmp_path):
    save(tmp_path, 4, content="old")
    save(tmp_path, 4, content="new")
    assert names(tmp_path) == ["latest", "step_4"]
    assert (tmp_path / "step_4" / "manifest.json").read_text() == "new"


def test_leftovers_of_killed_runs_are_removed_by_the_next_save(tmp_path):
    for name in (".step_3.partial", ".step_7.partial", ".step_1.deleted"):
        (tmp_path / name / "shards").mkdir(parents=True)
    save(tmp_path, 3)
    assert names(tmp_path) == ["latest", "step_3"]


class Killed(BaseException):
    """The process ends here."""


def kill_at_call(monkeypatch, name, number):
    """Let the number-th call of a function of os end the process before it has an effect."""
    calls, original = [], getattr(os, name)

    def function(*args):
        calls.append(args)
        if len(calls) == number:
            raise Killed
        return original(*args)

    monkeypatch.setattr(directory.os, name, function)


@pytest.mark.parametrize(
    "function, call, newest, content",
    [
        ("rename", 1, "step_4", "old"),  # before the old step_4 is moved out of the way
        ("rename", 2, ".step_4.replaced", "old"),  # before the new one gets its name
        ("replace", 1, "step_4", "new"),  # before latest is replaced
    ],
)
def test_a_kill_while_a_step_is_saved_again_leaves_one_of_the_two(
    tmp_path, monkeypatch, function, call, newest, content
):
    save(tmp_path, 4, keep=1, content="old")
    with monkeypatch.context() as patch:
        kill_at_call(patch, function, call)
        with pytest.raises(Killed):
            save(tmp_path, 4, keep=1, content="new")
    found = newest_checkpoint(tmp_path)
    assert found.name == newest
    assert (found / "manifest.json").read_text() == content
    begin(tmp_path, 5)
    assert {step: path.name for step, path in complete_checkpoints(tmp_path).items()} == {
        4: "step_4"
    }
    assert (tmp_path / "step_4" / "manifest.json").read_text() == content


@pytest.mark.parametrize(
    "function, call, newest",
    [("rename", 1, "step_4"), ("replace", 1, "step_4"), ("rename", 2, "step_5")],
)
def test_a_kill_while_publishing_leaves_a_complete_newest(
    tmp_path, monkeypatch, function, call, newest
):
    save(tmp_path, 4, keep=1)
    with monkeypatch.context() as patch:
        kill_at_call(patch, function, call)
        with pytest.raises(Killed):
            save(tmp_path, 5, keep=1)
    assert newest_checkpoint(tmp_path).name == newest
    save(tmp_path, 6, keep=1)
    assert names(tmp_path) == ["latest", "step_6"]


def test_the_room_is_said_where_another_rank_has_removed_the_directory(tmp_path):
    from tests.support.tiny import cpu_device

    cpu_device()
    from megatron_rl.checkpoint.torch_dist import _not_written

    for place in (tmp_path, tmp_path / ".step_4.partial" / "shards"):
        text = str(_not_written(place, OSError(27, "File too large")))
        assert text.startswith(f"{place} could not be written (")
        assert text.endswith(" free there): [Errno 27] File too large")
