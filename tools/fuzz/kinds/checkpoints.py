"""Checkpoints: flipped bits in manifests, invalid pointers, hostile indexes of shards.

No ranks: torch writes two tensors; manifest, pointer and index are read as resuming reads them.
"""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import pickletools
import random
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, Iterator

import torch
from torch.distributed import checkpoint
from torch.distributed.checkpoint import metadata

from megatron_rl.checkpoint.directory import newest_checkpoint
from megatron_rl.checkpoint.manifest import (
    MANIFEST,
    STATE,
    Manifest,
    fingerprints,
    read_manifest,
    read_state,
    verify_share,
    write_manifest,
)
from megatron_rl.checkpoint.safe_index import INDEX, check_index
from tools.fuzz.kind import Judge, Kind, Verdict, Wrong
from tools.fuzz.mutate import ODD, RAW, as_text, changed, encoded, flipped

_STATE = {"step": 3, "task": {"cursor": {"epoch": 0, "offset": 4}}, "identity": {"verb": "train"}}
_GLOBALS = (
    *("posix system", "builtins eval", "builtins getattr", "torch load", "torch Size", "os path"),
    *(f"{metadata.__name__} {name}" for name in ("Metadata", "MetadataIndex", "TensorProperties")),
    *(
        "collections OrderedDict",
        "pathlib PosixPath",
        "pathlib Path",
        "torch.serialization _get_layout",
    ),
    f"{metadata.__name__} _MEM_FORMAT_ENCODING",
)
_PATHS = ("../x", "/etc/passwd", "", ".", "a/../__0_0.distcp", "x" * 300, "\0", "__1_0.distcp")


def make(rng: random.Random) -> tuple[str, Any]:
    """(what is spoiled, how): manifest, files, state, latest, index, index fields, good."""
    what = rng.choice([*_SPOIL, "manifest", "manifest", "index"])
    return what, rng.getrandbits(64)


@contextlib.contextmanager
def judging(folder: Path) -> Iterator[Judge]:
    """One good checkpoint, whose copy is spoiled."""
    good, root = folder / "good", folder / "checkpoints"
    _make_checkpoint(good)
    attributes = _attributes()

    def judge(case: tuple[str, int]) -> Verdict:
        what, seed = case
        shutil.rmtree(root, ignore_errors=True)
        shutil.copytree(good, root / "step_3")
        rng = random.Random(seed)
        spoiled = _SPOIL[what](rng, root / "step_3")
        found = newest_checkpoint(root)
        if found != root / "step_3":
            raise Wrong(f"another newest checkpoint: {found}")
        try:
            _read(found)
        except Exception:
            if not spoiled:
                raise Wrong(f"a good checkpoint is refused ({what})") from None
            raise
        finally:
            if _attributes() != attributes:
                raise Wrong("a class of torch has other attributes")
        if spoiled == "never":
            raise Wrong(f"a spoiled {what} is taken")
        _check_index_by_torch(found / "shards")
        return Verdict.TAKEN

    yield judge


def _make_checkpoint(path: Path) -> None:
    shards = path / "shards"
    shards.mkdir(parents=True)
    state = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}
    with contextlib.redirect_stdout(io.StringIO()):
        checkpoint.save(state, storage_writer=checkpoint.FileSystemWriter(shards), no_dist=True)
    (path / STATE).write_bytes(encoded(_Never(), '{"step": 3}'))
    _write_manifest(path)


class _Never(random.Random):
    """Spoils nothing."""

    def random(self) -> float:
        return 1.0


def _write_manifest(path: Path) -> None:
    files = fingerprints(path, [p for p in path.rglob("*") if p.is_file() and p.name != MANIFEST])
    write_manifest(
        path, Manifest(3, {"hidden": 8}, {"world_size": 1}, 5, files, {"torch": "2"}, 0.5)
    )


def _read(path: Path) -> None:
    manifest = read_manifest(path)
    verify_share(path, manifest, 0, 1)
    read_state(path)
    check_index(path / "shards")


def _spoil_manifest(rng: random.Random, path: Path) -> str:
    file = path / MANIFEST
    way = rng.randrange(4)
    if way == 0:
        file.write_bytes(flipped(rng, file.read_bytes()))
    elif way == 1:
        data = bytearray(file.read_bytes())
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        file.write_bytes(data)
    elif way == 2:
        content = {"format": rng.choice([2, 2, 1, 3]), "step": 3, "files": {}, "sha256": "0" * 64}
        file.write_text(rng.choice([*RAW, as_text(rng, changed(rng, content))]), errors="replace")
    else:
        write_manifest(path, replace(read_manifest(path), step=rng.choice([0, 2, 4, 10**15])))
    return "never"


def _spoil_files(rng: random.Random, path: Path) -> str:
    file = rng.choice([p for p in sorted(path.rglob("*")) if p.is_file() and p.name != MANIFEST])
    if rng.random() < 0.2:
        file.unlink()
    elif rng.random() < 0.2:
        file.with_name("another").write_bytes(b"x")
        return "never" if file.parent != path else ""
    else:
        file.write_bytes(flipped(rng, file.read_bytes()))
    return "never"


def _spoil_state(rng: random.Random, path: Path) -> str:
    text = rng.choice(RAW) if rng.random() < 0.2 else as_text(rng, changed(rng, _STATE))
    (path / STATE).write_bytes(encoded(rng, text))
    _write_manifest(path)
    return "perhaps"


def _spoil_latest(rng: random.Random, path: Path) -> str:
    latest = path.parent / "latest"
    way = rng.randrange(5)
    if way == 0:
        os.mkfifo(latest)
    elif way == 1:
        latest.symlink_to(rng.choice([latest, Path("/dev/zero"), path, Path("none")]))
    elif way == 2:
        latest.mkdir()
    else:
        said = rng.choice(
            ["step_" + "9" * 5000, "step_٣", "../step_3", "", "step_9", *map(str, ODD)]
        )
        latest.write_bytes(said.encode("utf-8", "surrogatepass"))
    return ""


def _spoil_index(rng: random.Random, path: Path) -> str:
    """Steps of the pickle exchanged, or put in."""
    file = path / "shards" / INDEX
    data = file.read_bytes()
    if rng.random() < 0.4:
        data = flipped(rng, data)
    else:
        places = [place for _, _, place in pickletools.genops(data)]
        place = rng.choice(places)
        module, name = rng.choice(_GLOBALS).split()
        named = f"c{module}\n{name}\n".encode()
        evil = b"X\x04\x00\x00\x00evil"
        steps = (
            *(named, named + b"(N}" + evil + b"K\x01stb", named + b"}" + evil + b"K\x01sb", b"."),
            *(named + b"(" + evil + b"tR", named + b")\x81", b"\x93", b"0", b"2", b"b", b"R", b"s"),
            *(b"u", b"e", b"(" * 1000, b"\x94" * 100, b"\x85" * 2000, b"I" + b"9" * 5000 + b"\n"),
        )
        step = rng.choice(steps)
        data = data[:place] + step + data[place + rng.choice([0, 0, 1]) :]
    file.write_bytes(data)
    _write_manifest(path)
    return "perhaps"


def _spoil_fields(rng: random.Random, path: Path) -> str:
    """Another value in a field, pickled as torch does."""
    file = path / "shards" / INDEX
    index = pickle.loads(file.read_bytes())
    entry, stored = index.state_dict_metadata["a"], rng.choice(list(index.storage_data.values()))
    odd = [value for value in ODD if value == value]
    way = rng.randrange(6)
    if way == 0:
        stored.relative_path = rng.choice([*_PATHS, *odd])
    elif way == 1:
        setattr(stored, rng.choice(["offset", "length"]), rng.choice(odd))
    elif way == 2:
        entry.size = rng.choice([torch.Size([2**40, 3]), torch.Size([2]), (2, 3), None, *odd])
    elif way == 3:
        entry.chunks[0].offsets = rng.choice([torch.Size([2**62 - 1, 0]), torch.Size([]), *odd])
    elif way == 4:
        setattr(
            index,
            rng.choice(["planner_data", "storage_data", "state_dict_metadata"]),
            rng.choice(odd),
        )
    else:
        index.state_dict_metadata[rng.choice(["x", "b"])] = rng.choice([entry, *odd])
    file.write_bytes(pickle.dumps(index))
    _write_manifest(path)
    return "perhaps"


_SPOIL = {
    "manifest": _spoil_manifest,
    "files": _spoil_files,
    "state": _spoil_state,
    "latest": _spoil_latest,
    "index": _spoil_index,
    "fields": _spoil_fields,
    "good": lambda rng, path: "",
}


def _attributes() -> dict[str, list[str]]:
    """The names in classes that an index names."""
    kinds = [value for value in vars(metadata).values() if isinstance(value, type)]
    kinds += [torch.Size, Path, type(torch.float32), type(torch.serialization._get_layout)]
    found = {f"{kind.__module__}.{kind.__qualname__}": sorted(vars(kind)) for kind in kinds}
    members = {str(m): sorted(vars(m)) for m in metadata._MEM_FORMAT_ENCODING}
    return {**found, **members, "layout": sorted(vars(torch.serialization._get_layout))}


def _check_index_by_torch(shards: Path) -> None:
    """Check that an accepted index names only files of the directory, and lies within them."""
    index = pickle.loads((shards / INDEX).read_bytes())
    for stored in index.storage_data.values():
        file = shards / stored.relative_path
        if file.parent != shards or not file.is_file():
            raise Wrong(f"a shard at {stored.relative_path!r}")
        if not 0 <= stored.offset <= stored.offset + stored.length <= file.stat().st_size:
            raise Wrong(f"a shard from {stored.offset} on, of {stored.length}")
    for name, entry in index.state_dict_metadata.items():
        if entry.size.numel() > 10**6:
            raise Wrong(f"{name} of {entry.size}")


KIND = Kind("checkpoints", make, judging)
