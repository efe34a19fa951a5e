"""The manifest: what it says of the files, and what it says when it is damaged itself."""

import hashlib
import json
from dataclasses import asdict

import pytest

from megatron_rl.checkpoint.manifest import (
    Damaged,
    Manifest,
    fingerprint,
    fingerprints,
    read_manifest,
    read_state,
    score_of,
    verify_share,
    write_manifest,
)
from megatron_rl.errors import UserError

#: SHA-256 of b"abc", the example of FIPS 180-4.
ABC = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def manifest(**changes):
    fields = dict(
        step=3,
        architecture={"hidden_size": 8},
        layout={"expert": 2},
        optimizer_step=12,
        files={"a": [3, ABC]},
        versions={"torch": "2"},
    )
    return Manifest(**{**fields, **changes})


def test_fingerprint_is_size_and_sha256(tmp_path):
    (tmp_path / "inner").mkdir()
    file = tmp_path / "inner" / "file"
    file.write_bytes(b"abc")
    assert fingerprint(file) == [3, ABC]
    assert fingerprints(tmp_path, [file]) == {"inner/file": [3, ABC]}


def test_a_large_file_is_read_to_its_end(tmp_path):
    file = tmp_path / "file"
    file.write_bytes(bytes(2**21 + 5))
    size, digest = fingerprint(file)
    with open(file, "r+b") as stream:
        stream.seek(2**21 + 4)
        stream.write(b"\1")
    assert size == 2**21 + 5
    assert fingerprint(file) != [size, digest]


def test_a_manifest_comes_back_as_written(tmp_path):
    write_manifest(tmp_path, manifest())
    assert read_manifest(tmp_path) == manifest()


def test_the_checksum_is_that_of_the_other_lines(tmp_path):
    """As anyone can work it out: SHA-256 of the same JSON without the last entry."""
    write_manifest(tmp_path, manifest(score=0.1))
    text = (tmp_path / "manifest.json").read_text()
    content = json.loads(text)
    assert list(content)[-2:] == ["format", "sha256"] and content["format"] == 2
    before, _, _ = text.rpartition(',\n "sha256"')
    assert content["sha256"] == hashlib.sha256((before + "\n}").encode()).hexdigest()


def test_no_bit_of_a_manifest_can_be_turned_over(tmp_path):
    write_manifest(tmp_path, manifest(score=0.5))
    file = tmp_path / "manifest.json"
    data, accepted = file.read_bytes(), []
    for bit in range(8 * len(data)):
        spoiled = bytearray(data)
        spoiled[bit // 8] ^= 1 << bit % 8
        file.write_bytes(spoiled)
        try:
            read_manifest(tmp_path)
            accepted.append(bit)
        except UserError as error:
            assert "\n" not in str(error)
    assert len(data) > 300 and accepted == []
    file.write_bytes(data)
    assert read_manifest(tmp_path) == manifest(score=0.5)


@pytest.mark.parametrize("change", [b" ", b"\n", b"{}", b"\0"])
def test_nothing_may_stand_behind_a_manifest(tmp_path, change):
    write_manifest(tmp_path, manifest())
    with open(tmp_path / "manifest.json", "ab") as file:
        file.write(change)
    with pytest.raises(Damaged, match="manifest.json is damaged"):
        read_manifest(tmp_path)


def of_format_1(**changes):
    return json.dumps({**asdict(manifest()), "format": 1, **changes}, indent=1)


def test_a_manifest_of_format_1_is_read(tmp_path):
    (tmp_path / "manifest.json").write_text(of_format_1())
    assert read_manifest(tmp_path) == manifest(format=1)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"step": "3"}, "'step': Input should be a valid integer"),
        ({"step": True}, "'step': Input should be a valid integer"),
        ({"step": -1}, "'step': Input should be greater than or equal to 0"),
        ({"optimizer_step": 1.5}, "'optimizer_step': Input should be a valid integer"),
        ({"layout": None}, "'layout': Input should be a valid dictionary"),
        ({"score": "high"}, "'score': Input should be a valid number"),
        ({"versions": {"torch": 2}}, "'versions.torch': Input should be a valid string"),
        ({"files": {"a": [3]}}, "'files.a': List should have at least 2 items"),
        ({"files": {"a": [-1, ABC]}}, "'files.a': Value error, bytes and SHA-256 are expected"),
        ({"files": {"a": [3, "x"]}}, "'files.a': Value error, bytes and SHA-256 are expected"),
        ({"files": {"../a": [3, ABC]}}, "Value error, a path within the checkpoint is expected"),
        ({"files": {"/etc/passwd": [3, ABC]}}, "a path within the checkpoint is expected"),
        ({"other": 1}, "'other': Unexpected keyword argument"),
        ({"sha256": ABC}, "'sha256': Unexpected keyword argument"),
    ],
)
def test_a_value_that_is_none_of_its_kind_is_named(tmp_path, change, reason):
    (tmp_path / "manifest.json").write_text(of_format_1(**change))
    with pytest.raises(Damaged) as error:
        read_manifest(tmp_path)
    assert reason in str(error.value) and "\n" not in str(error.value)


def test_the_step_is_that_of_the_directory(tmp_path):
    for name, step, right in (
        ("step_3", 3, True),
        ("step_4", 3, False),
        (".step_4.replaced", 3, False),
        ("best", 3, True),
    ):
        (tmp_path / name).mkdir()
        write_manifest(tmp_path / name, manifest(step=step))
        if right:
            assert read_manifest(tmp_path / name).step == 3
        else:
            with pytest.raises(Damaged, match="manifest.json is of step 3; expected that of its"):
                read_manifest(tmp_path / name)


def test_the_score_of_a_damaged_manifest_is_not_known(tmp_path):
    write_manifest(tmp_path, manifest(score=0.25))
    assert score_of(tmp_path) == 0.25
    file = tmp_path / "manifest.json"
    file.write_text(file.read_text().replace("0.25", "9.25"))
    assert score_of(tmp_path) is None


def manifest_of(tmp_path):
    return manifest(
        files=fingerprints(tmp_path, [tmp_path / "shards" / "x", tmp_path / "state.json"])
    )


def test_a_file_that_is_not_listed_is_named(tmp_path):
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "x").write_bytes(b"abc")
    (tmp_path / "state.json").write_text('{"step": 3}')
    verify_share(tmp_path, manifest_of(tmp_path), 0, 1)
    (tmp_path / "shards" / ".nfs0001").write_bytes(b"")  # NFS keeps what is deleted and still open
    (tmp_path / "note.txt").write_bytes(b"never read")
    verify_share(tmp_path, manifest_of(tmp_path), 0, 1)
    (tmp_path / "shards" / "y").write_bytes(b"abc")
    with pytest.raises(Damaged, match="shards/y is not in the manifest; expected every file"):
        verify_share(tmp_path, manifest_of(tmp_path), 0, 1)


@pytest.mark.parametrize("content", ["", "[1]", "{", '{"a": NaN}', "[" * 10**5, "9" * 5000])
def test_a_damaged_state_is_named(tmp_path, content):
    (tmp_path / "state.json").write_text(content)
    with pytest.raises(Damaged, match=f"{tmp_path}/state.json is damaged .*; expected the state"):
        read_state(tmp_path)
    with pytest.raises(Damaged, match="state.json is damaged .No such file"):
        read_state(tmp_path / "none")


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"format": 1}', '{"step": 3}', "\x00\x01", "[" * 10**5, "9" * 5000]
)
def test_a_damaged_manifest_is_named(tmp_path, content):
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(UserError, match=f"{tmp_path}/manifest.json is damaged .*; expected .*; "):
        read_manifest(tmp_path)


def test_a_missing_manifest_is_named(tmp_path):
    with pytest.raises(UserError, match=f"{tmp_path}/manifest.json is missing; .*; "):
        read_manifest(tmp_path)


def test_a_manifest_of_another_format_is_refused(tmp_path):
    write_manifest(tmp_path, manifest())
    content = json.loads((tmp_path / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps({**content, "format": 9}))
    with pytest.raises(UserError, match="has format 9; this version reads formats 1 and 2; "):
        read_manifest(tmp_path)
