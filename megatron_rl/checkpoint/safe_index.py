"""The index of a checkpoint's shards is a pickle; a pickle can run anything.

torch reads ``.metadata`` with ``pickle.load``, and objects in the shards that are no tensors
(Megatron-Core 0.19 keeps the common part of a checkpoint there) with ``weights_only=False``. Before
it may, both are read here in ways that run nothing. All other files are read as tensors
(``weights_only``) or as JSON.

The index is read with records of our own in the place of torch's classes (`index_pickle.py`), so
that no step of the pickle acts on a thing that outlives it. What it then says is checked: every
shard is a file of the same directory, and lies within it.
"""

from __future__ import annotations

import io
import math
import pickle
from pathlib import Path
from typing import Any

import torch

from megatron_rl.checkpoint.index_pickle import Record, Refused, Size, read_index
from megatron_rl.checkpoint.manifest import Damaged
from megatron_rl.files import read_bounded

INDEX = ".metadata"
#: Largest index; one of 100,000 shards has 20 MB.
MOST_BYTES = 1 << 29
_OBJECT = "BytesStorageMetadata"


def check_index(directory: Path) -> None:
    """Make sure that reading the index of a shard directory runs nothing, and nothing outside it.

    Raises:
        Damaged: it would, or is no index.
    """
    path = directory / INDEX
    try:
        data = read_bounded(path, MOST_BYTES)
        objects = _checked(read_index(data), _sizes(directory))
    except FileNotFoundError:
        raise Damaged(f"{path} is missing; expected it in a checkpoint") from None
    except OSError as error:
        raise _unsafe(path, str(error.strerror)) from error
    except Refused as error:
        raise _unsafe(path, str(error)) from error
    _check_unpickled(path, data)
    for stored in objects:
        _check_object(directory / stored["relative_path"], stored["offset"], stored["length"])


def _check_unpickled(path: Path, data: bytes) -> None:
    """What is known to be safe is read as torch will: it may be damaged in ways that the reader
    here, which is written in Python, does not mind (a frame that is cut short).
    """
    try:
        pickle.loads(data)
    except Exception as error:  # noqa: BLE001 - a damaged pickle raises anything
        raise _unsafe(path, f"a damaged pickle ({type(error).__name__})") from error


def _unsafe(path: Path, reason: str) -> Damaged:
    return Damaged(
        f"{path} is no index of shards that can be read safely: {reason}; expected one that this "
        "program has written; do not use this checkpoint"
    )


def _check_object(path: Path, offset: int, length: int) -> None:
    try:
        with open(path, "rb") as file:
            file.seek(offset)
            torch.load(io.BytesIO(file.read(length)), weights_only=True)
    except Exception as error:  # noqa: BLE001 - a damaged pickle raises anything
        reason = f"{type(error).__name__}: {error}".splitlines()[0].partition(". ")[0]
        raise Damaged(
            f"{path} holds an object that cannot be read safely ({reason[:200]}); expected one "
            "that this program has written; do not use this checkpoint"
        ) from error


def _sizes(directory: Path) -> dict[str, int]:
    """Bytes of the files of a directory by name."""
    return {path.name: path.stat().st_size for path in directory.iterdir() if path.is_file()}


def _checked(index: Any, files: dict[str, int]) -> list[dict[str, Any]]:
    """Checks what an index says; where its objects that are no tensors are stored."""
    entries = _field(index, "Metadata", "state_dict_metadata", dict)
    shards: dict[tuple[str, tuple[Any, ...] | None], dict[str, Any]] = {}
    objects = []
    for key, stored in _field(index, "Metadata", "storage_data", dict).items():
        name = _field(key, "MetadataIndex", "fqn", str)
        offset = key.fields.get("offset")
        _expect(offset is None or isinstance(offset, Size), "an offset", offset)
        shards[name, offset] = _stored(stored, files)
        _expect(name in entries, "the name of an entry", name)
        if getattr(entries[name], "kind", "") == _OBJECT:
            objects.append(shards[name, offset])
    _check_planner_data(index)
    for name, entry in entries.items():
        _expect(isinstance(name, str), "a name", name)
        if getattr(entry, "kind", "") != _OBJECT:
            _check_tensor(name, entry, shards, sum(files.values()))
    return objects


def _stored(stored: Any, files: dict[str, int]) -> dict[str, Any]:
    """Where a shard is: in a file of the directory, all of it."""
    path = _field(stored, "_StorageInfo", "relative_path", str)
    begin = _field(stored, "_StorageInfo", "offset", int)
    length = _field(stored, "_StorageInfo", "length", int)
    _expect(path in files, "the name of a file beside it", path)
    _expect(0 <= begin <= files[path] - length and length >= 0, f"a part of {path}", begin)
    _expect(not stored.fields.get("transform_descriptors"), "no transforms", stored.kind)
    return stored.fields


def _check_tensor(name: str, entry: Any, shards: dict[Any, Any], most_bytes: int) -> None:
    """Its chunks are stored and within it, and it is no larger than what is stored at all."""
    size = _field(entry, "TensorStorageMetadata", "size", Size)
    properties = _field(entry, "TensorStorageMetadata", "properties", Record)
    dtype = _field(properties, "TensorProperties", "dtype", torch.dtype)
    width = dtype.itemsize
    _expect(math.prod(size) * width <= most_bytes, f"{name} of the size of its files", size)
    for chunk in _field(entry, "TensorStorageMetadata", "chunks", list):
        begin = _field(chunk, "ChunkStorageMetadata", "offsets", Size)
        sizes = _field(chunk, "ChunkStorageMetadata", "sizes", Size)
        _expect(len(begin) == len(sizes) == len(size), f"a chunk of {name}", sizes)
        inside = all(b + s <= whole for b, s, whole in zip(begin, sizes, size))
        _expect(inside, f"a chunk within {name}", begin)
        stored = shards.get((name, begin))
        _expect(stored is not None, f"where the chunk of {name} is stored", begin)
        assert stored is not None
        _expect(math.prod(sizes) * width <= stored["length"], f"a chunk of {name}", sizes)


def _check_planner_data(index: Record) -> None:
    """What torch keeps of nested state dicts, and Megatron of reshaped tensors: paths and sizes."""
    for field in ("planner_data", "mcore_data"):
        data = index.fields.get(field)
        _expect(data is None or isinstance(data, dict), field, data)
        for key, value in (data or {}).items():
            inner = list(value.values()) if isinstance(value, dict) else [value]
            flat = all(
                isinstance(part, (tuple, list)) and all(type(x) in (str, int) for x in part)
                for part in inner
            )
            _expect(isinstance(key, str) and flat, f"plain paths in {field}", key)


def _field(record: Any, kind: str, name: str, of: type) -> Any:
    """A field of a record of a kind, of a type."""
    _expect(isinstance(record, Record) and record.kind == kind, f"a {kind}", record)
    value = record.fields.get(name)
    _expect(isinstance(value, of) and not isinstance(value, bool), f"{kind}.{name}", value)
    return value


def _expect(right: bool, expected: str, found: Any) -> None:
    if not right:
        shown = found.kind if isinstance(found, Record) else found
        if isinstance(shown, (dict, list)) or type(shown) is tuple:  # of any depth
            shown = f"a {type(shown).__name__}"
        raise Refused(f"found {str(shown)[:80]!a}, expected {expected[:80]!a}")
