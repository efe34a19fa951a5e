"""What a node says of itself: versions, code, configuration and the content of data files."""

import hashlib

import megatron_rl
from megatron_rl.device import node_facts
from megatron_rl.device.node_facts import Described, digest, facts_of_this_node


def of(text):
    return hashlib.sha256(text).hexdigest()[:12]


def test_files_of_other_content_are_told_apart_by_size_and_content(tmp_path):
    (tmp_path / "a").write_bytes(b"one")
    assert digest(tmp_path / "a") == f"3 bytes, {of(b'one')}"
    (tmp_path / "a").write_bytes(b"two")
    assert digest(tmp_path / "a") == f"3 bytes, {of(b'two')}"


def test_of_large_files_the_ends_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr(node_facts, "WHOLE_BYTES", 10)
    monkeypatch.setattr(node_facts, "ENDS_BYTES", 2)
    (tmp_path / "a").write_bytes(b"abcdefghijkl")
    assert digest(tmp_path / "a") == f"12 bytes, {of(b'abkl')}"


def test_a_directory_is_its_files(tmp_path, monkeypatch):
    monkeypatch.setattr(node_facts, "IN_DIRECTORY_BYTES", 4)
    (tmp_path / "config.json").write_bytes(b"{}")
    (tmp_path / "weights").write_bytes(b"large")
    before = digest(tmp_path)
    assert before.startswith("2 files, ")
    (tmp_path / "weights").write_bytes(b"LARGE")  # weights: the size alone
    assert digest(tmp_path) == before
    (tmp_path / "config.json").write_bytes(b"[]")
    assert digest(tmp_path) != before


def test_a_node_tells_versions_code_configuration_and_data(tmp_path):
    (tmp_path / "train.jsonl").write_bytes(b"{}")
    files = {"data.train": tmp_path / "train.jsonl"}
    described = Described({"seed": 3, "model.yarn": None}, files, tmp_path / "runs")
    facts = facts_of_this_node(lambda: described, 4, 8)
    same = facts["same"]
    assert (same["NODES"], same["ranks of the node"]) == (4, 8)
    assert same["megatron_rl"] == megatron_rl.__version__
    assert same["transformer-engine"] == "not installed" or same["transformer-engine"][0].isdigit()
    assert (same["seed"], same["model.yarn"]) == (3, None)
    assert same["content of data.train"] == f"2 bytes, {of(b'{}')}"
    assert len(same["file megatron_rl/cli.py"]) == 12
    assert facts["run_dir"] == str(tmp_path / "runs") and "error" not in facts


def test_a_file_that_cannot_be_read_is_the_node_s_error(tmp_path):
    described = Described({}, {"data.train": tmp_path / "gone.jsonl"}, tmp_path)
    facts = facts_of_this_node(lambda: described, 1, 1)
    assert facts["error"] == (
        f"data.train: {tmp_path / 'gone.jsonl'} cannot be read (No such file or directory)"
    )
