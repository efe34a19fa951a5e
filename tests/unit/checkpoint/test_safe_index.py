"""Nothing in a checkpoint that somebody else has made is run."""

import contextlib
import os
import pickle
import re
import shutil
from dataclasses import replace
from operator import attrgetter
from pathlib import Path

import pytest
import torch

from megatron_rl.checkpoint.index_pickle import Refused, read_index
from megatron_rl.checkpoint.manifest import (
    MANIFEST,
    Damaged,
    fingerprint,
    read_manifest,
    write_manifest,
)
from megatron_rl.checkpoint.safe_index import check_index
from tests.support.tiny import cpu_device, tiny_config
from tests.support.tiny_training import build_training
from tests.unit.checkpoint.test_save_load import load, load_weights, save


class Harm:
    """Unpickled, it makes a file: it could do anything."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return (Path.touch, (Path(self.marker),))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """(training, checkpoint)"""
    cpu_device()
    training = build_training(tiny_config())
    training.step(0)
    return training, save(training, tmp_path_factory.mktemp("saved"), 1)


def files_of(checkpoint):
    return [p for p in sorted(checkpoint.rglob("*")) if p.is_file() and p.name != MANIFEST]


def planted(saved, tmp_path, name, write):
    """A copy with one file written anew and the manifest made to agree."""
    copy = tmp_path / "step_1"
    shutil.copytree(saved[1], copy)
    write(copy / name)
    manifest = read_manifest(copy)
    files = {**manifest.files, name: fingerprint(copy / name)}
    write_manifest(copy, replace(manifest, files=files))
    return copy


NAMES = [
    "random/rank_0.pt",
    "shards/.metadata",
    "shards/__0_0.distcp",
    "shards/common.pt",  # Megatron-Core 0.19 has none, and is not to look for one
    "shards/metadata.json",
    "state.json",
]


def test_there_are_no_other_files(saved):
    found = {str(path.relative_to(saved[1])) for path in files_of(saved[1])}
    assert set(NAMES) - {"shards/common.pt"} <= found <= set(NAMES)


@pytest.mark.parametrize("how", [pickle.dump, torch.save])
@pytest.mark.parametrize("name", NAMES)
def test_a_pickle_in_the_place_of_a_file_is_not_run(saved, tmp_path, name, how):
    marker = tmp_path / "harm"
    how_plain = pickle.dumps(Harm(marker))
    pickle.loads(how_plain)  # it would work
    os.unlink(marker)

    def write(path):
        with open(path, "wb") as file:
            how(Harm(marker), file)

    copy = planted(saved, tmp_path, name, write)
    for read in (load, load_weights):
        try:
            read(saved[0], copy)
        except Exception:  # noqa: BLE001 - any refusal will do, as long as nothing was run
            pass
    from megatron_rl.checkpoint.torch_dist import StoredTensors

    is_index = name == "shards/.metadata"
    with pytest.raises(Damaged) if is_index else contextlib.suppress(Damaged):
        StoredTensors(copy / "shards")
    assert not marker.exists()


def test_the_index_that_names_something_else_is_named(saved, tmp_path):
    def write(path):
        path.write_bytes(pickle.dumps(Harm(tmp_path / "harm")))

    copy = planted(saved, tmp_path, "shards/.metadata", write)
    with pytest.raises(Damaged) as error:
        load(saved[0], copy)
    index = copy / "shards" / ".metadata"
    assert re.fullmatch(
        re.escape(str(index))
        + r" is no index .*: names (builtins\.getattr|pathlib\.Path\.touch), which an index .*",
        str(error.value),
    )


def test_an_object_among_the_tensors_is_not_run(saved, tmp_path):
    """At its own place in a shard, as Megatron-Core 0.19 keeps the common part of a checkpoint."""
    from torch.distributed import checkpoint

    for name, value in (("good", {"step": 3}), ("bad", Harm(tmp_path / "harm"))):
        directory = tmp_path / name
        writer = checkpoint.FileSystemWriter(directory)
        checkpoint.save({"weight": torch.ones(2), "x": value}, storage_writer=writer, no_dist=True)
    check_index(tmp_path / "good")
    with pytest.raises(
        Damaged, match="__0_0.distcp holds an object that cannot be read safely .Unpick"
    ):
        check_index(tmp_path / "bad")
    assert not (tmp_path / "harm").exists()


class Attribute:
    """Pickled, it is the attribute of another object."""

    def __init__(self, of, name):
        self.of, self.name = of, name

    def __reduce__(self):
        return (getattr, (self.of, self.name))


def test_members_of_an_enumeration_as_early_pythons_store_them():
    """3.11.0 to 3.11.3 store getattr(enumeration, name); of other objects no attribute is given."""
    from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING, Metadata

    member = _MEM_FORMAT_ENCODING.TORCH_CHANNELS_LAST
    stored = pickle.dumps(Attribute(_MEM_FORMAT_ENCODING, member.name))
    assert read_index(stored) == "TORCH_CHANNELS_LAST"
    for of, name in ((Metadata, "__init__"), (_MEM_FORMAT_ENCODING, "__reduce_ex__")):
        with pytest.raises(Refused, match=f"asks for the attribute '{name}' of something"):
            read_index(pickle.dumps(Attribute(of, name)))


METADATA = b"ctorch.distributed.checkpoint.metadata\n"
#: A pickle's steps by hand: what is named, then (None, {"evil": 1}) as its state.
STATE = b"(N}X\x04\x00\x00\x00evilK\x01stb."
#: Name -> pickle, and what of Python it would change.
BUILDS = {
    "a class of torch": (METADATA + b"MetadataIndex\n" + STATE, "MetadataIndex"),
    "another": (METADATA + b"Metadata\n" + STATE, "Metadata"),
    "an enumeration": (METADATA + b"_MEM_FORMAT_ENCODING\n" + STATE, "_MEM_FORMAT_ENCODING"),
    "a member of one": (
        METADATA + b"_MEM_FORMAT_ENCODING\n" + b"(K\x00tR" + STATE,
        "_MEM_FORMAT_ENCODING.TORCH_CONTIGUOUS_FORMAT",
    ),
    "a function": (b"ctorch.serialization\n_get_layout\n" + STATE, None),
    "a path": (b"cpathlib\nPosixPath\n" + STATE, None),
}


@pytest.mark.parametrize("name", BUILDS)
def test_a_refused_index_has_set_nothing(tmp_path, name):
    """BUILD sets attributes on whatever is there: on classes of torch they outlive the refusal."""
    import torch.distributed.checkpoint.metadata as module

    stored, changed = BUILDS[name]
    (tmp_path / ".metadata").write_bytes(stored)
    with pytest.raises(Damaged, match="no index of shards that can be read safely: sets attribut"):
        check_index(tmp_path)
    owners = [torch.serialization._get_layout, Path]
    if changed:
        owners += [attrgetter(changed)(module)]
    assert [owner for owner in owners if hasattr(owner, "evil")] == []


def index_of(directory):
    """The index of a small checkpoint, as torch reads it."""
    from torch.distributed import checkpoint

    state = {"weight": torch.arange(6.0).view(2, 3), "x": {"step": 3}}
    writer = checkpoint.FileSystemWriter(directory)
    checkpoint.save(state, storage_writer=writer, no_dist=True)
    return pickle.loads((directory / ".metadata").read_bytes())


def refused(directory, index, reason):
    (directory / ".metadata").write_bytes(pickle.dumps(index))
    with pytest.raises(Damaged, match=f"read safely: found {reason}") as error:
        check_index(directory)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "path", ["../secret", "/etc/hostname", "sub/../__0_0.distcp", "", ".", "none.distcp"]
)
def test_a_shard_outside_the_checkpoint_is_refused(tmp_path, path):
    (tmp_path / "secret").write_bytes(bytes(10_000))
    directory = tmp_path / "shards"
    index = index_of(directory)
    check_index(directory)
    for stored in index.storage_data.values():
        stored.relative_path = path
    refused(directory, index, f"'{path}', expected 'the name of a file beside it'")


def test_a_shard_that_is_not_in_its_file_is_refused(tmp_path):
    index = index_of(tmp_path)
    size = (tmp_path / "__0_0.distcp").stat().st_size
    stored = next(s for i, s in index.storage_data.items() if i.fqn == "weight")
    good = (stored.offset, stored.length)
    for offset, length in ((-1, 5), (0, size + 1), (size, 1), (1 << 70, 1), (5, -1), (True, 1)):
        stored.offset, stored.length = offset, length
        refused(tmp_path, index, ".*(a part of __0_0.distcp|_StorageInfo.offset)")
    stored.offset, stored.length = good
    stored.transform_descriptors = ["zstd"]
    refused(tmp_path, index, ".*no transforms")


def test_tensors_larger_than_what_is_stored_are_refused(tmp_path):
    index = index_of(tmp_path)
    entry = index.state_dict_metadata["weight"]
    for size in ((1 << 40, 3), (1 << 61,) * 60):
        entry.size = torch.Size(size)
        refused(tmp_path, index, ".*weight of the size of its files")
    entry.size = torch.Size((2, 3))
    entry.chunks[0].sizes = torch.Size((2, 4))
    refused(tmp_path, index, ".*a chunk within weight")
    entry.chunks[0].sizes = torch.Size((2, 3))
    entry.chunks[0].offsets = torch.Size((0,))
    refused(tmp_path, index, ".*a chunk of weight")
    entry.chunks = "none"
    refused(tmp_path, index, ".*TensorStorageMetadata.chunks")


@pytest.mark.parametrize(
    ("name", "value"),
    [("memory_format", ((((),),),)), ("memory_format", 7), ("pin_memory", 1), ("dtype", "int8")],
)
def test_properties_that_torch_does_not_take_are_refused(tmp_path, monkeypatch, name, value):
    """torch's own reader asks what the format is, and shows what it does not know."""
    index = index_of(tmp_path)
    names = ("dtype", "layout", "requires_grad", "memory_format", "pin_memory")
    kind = type(index.state_dict_metadata["weight"].properties)
    right = kind.__getstate__

    def spoiled(self):
        return tuple((dict(zip(names, right(self))) | {name: value}).values())

    monkeypatch.setattr(kind, "__getstate__", spoiled)
    (tmp_path / ".metadata").write_bytes(pickle.dumps(index))
    with pytest.raises(Damaged, match=f"properties of a tensor with a {name} that is none"):
        check_index(tmp_path)


def test_a_frame_that_is_cut_off_is_refused(tmp_path):
    """Python's own unpickler reads what is there; the one in C, which torch asks, does not."""
    index_of(tmp_path)
    path = tmp_path / ".metadata"
    data = bytearray(path.read_bytes())
    assert data[2:3] == pickle.FRAME
    data[7] = 2  # of the frame's length, 2 << 32
    path.write_bytes(data)
    with pytest.raises(pickle.UnpicklingError):
        pickle.loads(data)
    with pytest.raises(Damaged, match="a frame is cut off"):
        check_index(tmp_path)


def nested(levels):
    value = ()
    for _ in range(levels):
        value = (value, value)
    return value


@pytest.mark.parametrize(
    "value", [frozenset({1}), {1, 2}, b"bytes", 2.5, "x" * 1000, nested(60), [[]], {}, {"a": []}]
)
def test_what_is_no_index_is_refused_at_once(tmp_path, value):
    (tmp_path / ".metadata").write_bytes(pickle.dumps(value))
    with pytest.raises(Damaged, match="no index of shards that can be read safely: ") as error:
        check_index(tmp_path)
    assert len(str(error.value)) < 500


def test_a_key_whose_hash_takes_for_ever_is_not_hashed(tmp_path):
    key = pickle.dumps(nested(60), 2)[2:-1]  # without the first and last step
    (tmp_path / ".metadata").write_bytes(b"\x80\x04}" + key + b"K\x01s.")
    with pytest.raises(Damaged, match="read safely: a key that is no text; expected"):
        check_index(tmp_path)


def test_the_hash_of_a_key_is_that_of_a_name_and_a_size(tmp_path):
    """torch hashes a key when its pickle sets the item, whatever becomes of the key later, and
    wherever the dict is.
    """
    new = METADATA + b"MetadataIndex\n)\x81"
    slow = b"}(X\x06\x00\x00\x00offset" + pickle.dumps(nested(60), 2)[2:-1] + b"u"
    good = b"}(X\x03\x00\x00\x00fqnX\x01\x00\x00\x00wu"
    reasons = {
        new + slow + b"b": "a key of a shard that is none",
        new + good + b"b" + good + b"b": "attributes that a MetadataIndex does not have",
        b"}" + new + b"K\x01s": "a key that is no text",
        b"}" + METADATA + b"StorageMeta\n)\x81" + b"K\x01s": "a key that is no text",
    }
    for stored, reason in reasons.items():
        (tmp_path / ".metadata").write_bytes(b"\x80\x04" + stored + b".")
        with pytest.raises(Damaged, match=f"read safely: {reason}; expected"):
            check_index(tmp_path)


def test_what_torch_cannot_read_is_one_line(tmp_path, monkeypatch):
    """Whatever it is that the reader here has not minded."""
    index_of(tmp_path)
    monkeypatch.setattr("pickle.loads", lambda data: [][1])
    with pytest.raises(Damaged, match="read safely: a damaged pickle .IndexError.; expected"):
        check_index(tmp_path)


def test_an_index_that_is_none_is_one_line(tmp_path):
    with pytest.raises(Damaged, match=".metadata is missing; expected it in a checkpoint"):
        check_index(tmp_path)
    os.mkfifo(tmp_path / ".metadata")
    with pytest.raises(Damaged, match="read safely: not a regular file; expected"):
        check_index(tmp_path)
