"""The manifest: what it says of the files, and what it says when it is damaged itself."""

import json

import pytest

from megatron_rl.checkpoint.manifest import (
    Manifest,
    fingerprint,
    fingerprints,
    read_manifest,
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


@pytest.mark.parametrize("content", ["", "{", "[]", '{"format": 1}', '{"step": 3}', "\x00\x01"])
def test_a_damaged_manifest_is_named(tmp_path, content):
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(UserError, match=f"{tmp_path}/manifest.json is damaged; expected .*; "):
        read_manifest(tmp_path)


def test_a_missing_manifest_is_named(tmp_path):
    with pytest.raises(UserError, match=f"{tmp_path}/manifest.json is missing; .*; "):
        read_manifest(tmp_path)


def test_a_manifest_of_another_format_is_refused(tmp_path):
    write_manifest(tmp_path, manifest())
    content = json.loads((tmp_path / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps({**content, "format": 9}))
    with pytest.raises(UserError, match="has format 9; this version reads format 1; "):
        read_manifest(tmp_path)
