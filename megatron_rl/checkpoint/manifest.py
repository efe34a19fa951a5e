"""The manifest of a checkpoint: what it is of, size and SHA-256 of every file, and of itself.

A checksum finds what a disk or a copy has damaged. It is no signature: who can write a checkpoint
can write its manifest too, so what is read is validated all the same.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from dataclasses import asdict
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Annotated, Any, Iterable

from pydantic import AfterValidator, ConfigDict, Field, ValidationError
from pydantic.dataclasses import dataclass

from megatron_rl.config.json_text import BadJson, parse_json
from megatron_rl.errors import UserError
from megatron_rl.files import read_bounded

if TYPE_CHECKING:  # studies read manifests' names without torch
    from torch.distributed import ProcessGroup

MANIFEST = "manifest.json"
STATE = "state.json"
FORMAT = 2
#: Formats that are read. 1 has no checksum of its own: its values are validated and no more.
_KNOWN = (1, FORMAT)
_DIGEST = "sha256"

#: Of a manifest, which has a line for each file of each rank, and of a state.
MOST_BYTES = 64 << 20

REMEDY = "restore the file from a copy, or delete the directory to go on from an older checkpoint"


def _inside(name: str) -> str:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or path.as_posix() != name or "\0" in name:
        raise ValueError("a path within the checkpoint is expected")
    return name


def _size_and_digest(entry: list[Any]) -> list[Any]:
    size, digest = entry
    if type(size) is not int or size < 0 or not re.fullmatch("[0-9a-f]{64}", str(digest)):
        raise ValueError("bytes and SHA-256 are expected")
    return entry


_Count = Annotated[int, Field(ge=0)]


@dataclass(frozen=True, config=ConfigDict(strict=True, extra="forbid", allow_inf_nan=False))
class Manifest:
    """Content of manifest.json, but for its checksum."""

    step: _Count
    architecture: dict[str, Any]
    layout: dict[str, Any]
    optimizer_step: (
        _Count | None
    )  #: updates the optimizer has made; None: saved without an optimizer
    #: path within the checkpoint -> [bytes, SHA-256]
    files: dict[
        Annotated[str, AfterValidator(_inside)],
        Annotated[list[Any], Field(min_length=2, max_length=2), AfterValidator(_size_and_digest)],
    ]
    versions: dict[str, str]  #: torch and megatron-core that wrote it
    score: float | None = None  #: of an evaluation of this step, higher is better; None: not known
    format: int = FORMAT


def fingerprint(path: Path) -> list[Any]:
    """[bytes, SHA-256] of a file, after making sure that it is on the disk."""
    digest, size = hashlib.sha256(), 0
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
            size += len(block)
        os.fsync(file.fileno())
    return [size, digest.hexdigest()]


def fingerprints(directory: Path, files: Iterable[Path]) -> dict[str, list[Any]]:
    """The fingerprints of some files of a checkpoint, by their path within it."""
    return {file.relative_to(directory).as_posix(): fingerprint(file) for file in files}


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Write manifest.json, the last file: a checkpoint without it does not count as one."""
    with open(directory / MANIFEST, "wb") as file:
        file.write(_with_digest(asdict(manifest)))
        file.flush()
        os.fsync(file.fileno())


def _with_digest(content: dict[str, Any]) -> bytes:
    """The bytes of manifest.json. They follow from the values, so none of them can differ."""
    digest = hashlib.sha256(json.dumps(content, indent=1, allow_nan=False).encode()).hexdigest()
    return json.dumps({**content, _DIGEST: digest}, indent=1, allow_nan=False).encode()


def score_of(directory: Path) -> float | None:
    """The score of a checkpoint; None where there is none, or no manifest that can be read."""
    try:
        return read_manifest(directory).score
    except (OSError, UserError):
        return None


class Damaged(UserError):
    """A checkpoint that is not what was written. An older one may be."""


def read_manifest(directory: Path) -> Manifest:
    """The manifest of a checkpoint directory.

    Raises:
        Damaged: it is missing, damaged, or of another step than the directory's name. UserError:
            its format is not known to this version.
    """
    path = directory / MANIFEST
    try:
        data = read_bounded(path, MOST_BYTES)
        content = parse_json(data, most_bytes=MOST_BYTES)
    except FileNotFoundError:
        raise Damaged(
            f"{path} is missing; a complete checkpoint has one; name another checkpoint"
        ) from None
    except OSError as error:
        raise _damaged(path, f"it cannot be read: {error.strerror}") from error
    except BadJson as error:
        raise _damaged(path, str(error)) from error
    manifest = _validated(path, content, data)
    if step_named(directory.name) not in (None, manifest.step):
        raise Damaged(
            f"{path} is of step {manifest.step}; expected that of its directory's name; name the "
            "directory by its step, or delete it to go on from an older checkpoint"
        )
    return manifest


def step_named(name: str) -> int | None:
    """The step that the name of a complete checkpoint's directory says; None for another name."""
    found = re.fullmatch(r"step_([0-9]{1,18})|\.step_([0-9]{1,18})\.replaced", name)
    return int(found[1] or found[2]) if found else None


def _validated(path: Path, content: Any, data: bytes) -> Manifest:
    if not isinstance(content, dict) or type(content.get("format")) is not int:
        raise _damaged(path, "no object with a format")
    if content["format"] not in _KNOWN:
        raise UserError(
            f"{path} has format {content['format']}; this version reads formats "
            f"{' and '.join(map(str, _KNOWN))}; load it with the version that wrote it"
        )
    if content["format"] == FORMAT:
        found = content.pop(_DIGEST, None)
        if found is None or _with_digest(content) != data:
            raise _damaged(path, "its own checksum is another")
    try:
        return Manifest(**content)
    except (ValidationError, TypeError) as error:
        reason = "other fields"
        if isinstance(error, ValidationError):
            wrong = error.errors()[0]
            reason = f"{'.'.join(map(str, wrong['loc']))[:80]!a}: {wrong['msg']}"
        raise _damaged(path, reason) from error


def _damaged(path: Path, reason: str) -> Damaged:
    return Damaged(f"{path} is damaged ({reason}); expected the manifest of a checkpoint; {REMEDY}")


def read_state(directory: Path) -> dict[str, Any]:
    """The caller's state in a checkpoint; see `save.save_checkpoint`.

    Raises:
        Damaged: it cannot be read, or is no JSON object.
    """
    path = directory / STATE
    try:
        state = parse_json(read_bounded(path, MOST_BYTES), most_bytes=MOST_BYTES)
    except (OSError, BadJson) as error:
        raise _no_state(path, getattr(error, "strerror", None) or str(error)) from error
    if not isinstance(state, dict):
        raise _no_state(path, f"a JSON {type(state).__name__}")
    return state


def _no_state(path: Path, reason: str) -> Damaged:
    return Damaged(f"{path} is damaged ({reason}); expected the state of a run; {REMEDY}")


def verify(directory: Path, manifest: Manifest, world: ProcessGroup) -> None:
    """Compare every file with the manifest; each rank reads its share of them. A collective.

    Raises:
        Damaged: a file is missing, has another size or another checksum, or is not in the manifest;
            the message names it.
    """
    from megatron_rl.parallel.collective_try import collective_try

    collective_try(world, lambda: verify_share(directory, manifest, world.rank(), world.size()))


def verify_share(directory: Path, manifest: Manifest, rank: int, ranks: int) -> None:
    """`verify`, of every ``ranks``-th file from the ``rank``-th on; of the first all names."""
    if rank == 0:
        _check_all_listed(directory, manifest)
    for name, (size, digest) in sorted(manifest.files.items())[rank::ranks]:
        path = directory / name
        if not path.is_file():
            raise Damaged(f"{path} is missing; the manifest lists it with {size} bytes; {REMEDY}")
        if path.stat().st_size != size:
            raise Damaged(
                f"{path} has {path.stat().st_size} bytes; the manifest says {size}; {REMEDY}"
            )
        found = fingerprint(path)[1]
        if found != digest:
            raise Damaged(
                f"{path} has SHA-256 {found[:12]}...; the manifest says {digest[:12]}...; {REMEDY}"
            )


def _check_all_listed(directory: Path, manifest: Manifest) -> None:
    """What is not compared must not be read. `.nfs...`: what NFS keeps of deleted files."""
    found = {path.relative_to(directory).as_posix() for path in directory.glob("*/*")}
    unlisted = {STATE, *found} - manifest.files.keys()
    absent = sorted(name for name in unlisted if not PurePosixPath(name).name.startswith(".nfs"))
    if absent:
        raise Damaged(
            f"{directory / absent[0]} is not in the manifest; expected every file of a checkpoint "
            f"there; remove what does not belong to it, or {REMEDY}"
        )
