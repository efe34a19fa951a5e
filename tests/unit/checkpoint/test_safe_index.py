"""Nothing in a checkpoint that somebody else has made is run."""

import contextlib
import json
import os
import pickle
import re
import shutil
from pathlib import Path

import pytest
import torch

from megatron_rl.checkpoint.manifest import MANIFEST, Damaged, fingerprint
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
    manifest = json.loads((copy / MANIFEST).read_text())
    manifest["files"][name] = fingerprint(copy / name)
    (copy / MANIFEST).write_text(json.dumps(manifest))
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
        + r" names (builtins\.getattr|pathlib\.Path\.touch), which an index .*",
        str(error.value),
    )


def test_an_object_among_the_tensors_is_not_run(saved, tmp_path):
    """At its own place in a shard, as Megatron-Core 0.19 keeps the common part of a checkpoint."""
    from torch.distributed import checkpoint

    from megatron_rl.checkpoint.safe_index import check_index

    for name, value in (("good", {"step": 3}), ("bad", Harm(tmp_path / "harm"))):
        directory = tmp_path / name
        writer = checkpoint.FileSystemWriter(directory)
        checkpoint.save({"weight": torch.ones(2), "x": value}, storage_writer=writer, no_dist=True)
    check_index(tmp_path / "good")
    with pytest.raises(
        Damaged, match="no index of shards that can be read safely .UnpicklingError: W"
    ):
        check_index(tmp_path / "bad")
    assert not (tmp_path / "harm").exists()


class Attribute:
    """Pickled, it is the attribute of another object."""

    def __init__(self, of, name):
        self.of, self.name = of, name

    def __reduce__(self):
        return (getattr, (self.of, self.name))


def test_members_of_an_enumeration_as_early_pythons_store_them(tmp_path):
    """3.11.0 to 3.11.3 store getattr(enumeration, name); of other objects no attribute is given."""
    from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING, Metadata

    from megatron_rl.checkpoint.safe_index import _Index

    def read(stored):
        path = tmp_path / ".metadata"
        path.write_bytes(pickle.dumps(stored))
        with open(path, "rb") as file:
            return _Index(file, path).load()

    member = _MEM_FORMAT_ENCODING.TORCH_CHANNELS_LAST
    assert read(Attribute(_MEM_FORMAT_ENCODING, member.name)) is member
    for of, name in ((Metadata, "__init__"), (_MEM_FORMAT_ENCODING, "__reduce_ex__")):
        with pytest.raises(Damaged, match=f"asks for the attribute {name} of "):
            read(Attribute(of, name))
