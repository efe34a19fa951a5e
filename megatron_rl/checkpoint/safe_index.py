"""The index of a checkpoint's shards is a pickle; a pickle can run anything.

torch reads ``.metadata`` with ``pickle.load``, and objects in the shards that are no tensors
(Megatron-Core 0.19 keeps the common part of a checkpoint there) with ``weights_only=False``. Before
it may, both are read here in ways that run nothing. All other files are read as tensors
(``weights_only``) or as JSON.
"""

from __future__ import annotations

import enum
import io
import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

from megatron_rl.checkpoint.manifest import Damaged

INDEX = ".metadata"
_METADATA = "torch.distributed.checkpoint.metadata"
#: Module -> names. All of them are plain records, or make one from their arguments.
_ALLOWED = {
    "torch": {"Size"},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    _METADATA: {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "pathlib": {"PosixPath"},
    "pathlib._local": {"PosixPath"},  # Python 3.13
    "collections": {"OrderedDict"},
}


class _Index(pickle.Unpickler):
    def __init__(self, file: Any, path: Path) -> None:
        super().__init__(file)
        self._path = path

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "getattr"):
            return self._member
        known = name in _ALLOWED.get(module, ())
        if known or (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)):
            return super().find_class(module, name)
        raise Damaged(
            f"{self._path} names {module}.{name}, which an index of tensors does not need; "
            "expected one that this program has written; do not use this checkpoint"
        )

    def _member(self, kind: Any, name: str) -> Any:
        """Early releases of Python 3.11 store the member of an enumeration as an attribute."""
        if isinstance(kind, type) and issubclass(kind, enum.Enum) and name in kind.__members__:
            return kind[name]
        raise Damaged(
            f"{self._path} asks for the attribute {name} of {kind}, which an index of tensors does "
            "not need; expected one that this program has written; do not use this checkpoint"
        )


def check_index(directory: Path) -> None:
    """Make sure that reading the index of a shard directory runs nothing.

    Raises:
        Damaged: it would, or is no index.
    """
    path = directory / INDEX
    try:
        with open(path, "rb") as file:
            index = _Index(file, path).load()
        objects = [
            stored
            for key, stored in index.storage_data.items()
            if isinstance(index.state_dict_metadata[key.fqn], BytesStorageMetadata)
        ]
        for stored in objects:
            with open(directory / stored.relative_path, "rb") as file:
                file.seek(stored.offset)
                torch.load(io.BytesIO(file.read(stored.length)), weights_only=True)
    except Damaged:
        raise
    except FileNotFoundError as error:
        raise Damaged(f"{error.filename} is missing; expected it in a checkpoint") from None
    except Exception as error:  # noqa: BLE001 - a damaged pickle raises anything
        reason = f"{type(error).__name__}: {error}".splitlines()[0].partition(". ")[0]
        raise Damaged(
            f"{path} is no index of shards that can be read safely ({reason}); expected one that "
            "this program has written; do not use this checkpoint"
        ) from error
