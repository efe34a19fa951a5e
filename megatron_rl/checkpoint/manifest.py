"""The manifest of a checkpoint: what it is of, and size and SHA-256 of every file."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Iterable

from torch.distributed import ProcessGroup

from megatron_rl.checkpoint.together import together
from megatron_rl.errors import UserError

MANIFEST = "manifest.json"
FORMAT = 1

REMEDY = "restore the file from a copy, or delete the directory to go on from an older checkpoint"


@dataclass(frozen=True)
class Manifest:
    """Content of manifest.json."""

    step: int
    architecture: dict[str, Any]
    layout: dict[str, Any]
    optimizer_step: int | None  #: updates the optimizer has made; None: saved without an optimizer
    files: dict[str, list]  #: path within the checkpoint -> [bytes, SHA-256]
    versions: dict[str, str]  #: torch and megatron-core that wrote it
    score: float | None = None  #: of an evaluation of this step, higher is better; None: not known
    format: int = FORMAT


def fingerprint(path: Path) -> list:
    """[bytes, SHA-256] of a file, after making sure that it is on the disk."""
    digest, size = hashlib.sha256(), 0
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
            size += len(block)
        os.fsync(file.fileno())
    return [size, digest.hexdigest()]


def fingerprints(directory: Path, files: Iterable[Path]) -> dict[str, list]:
    """The fingerprints of some files of a checkpoint, by their path within it."""
    return {file.relative_to(directory).as_posix(): fingerprint(file) for file in files}


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Write manifest.json, the last file: a checkpoint without it does not count as one."""
    with open(directory / MANIFEST, "w", encoding="utf-8") as file:
        json.dump(asdict(manifest), file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def score_of(directory: Path) -> float | None:
    """The score of a checkpoint; None where there is none, or no manifest that can be read."""
    try:
        return json.loads((directory / MANIFEST).read_text(encoding="utf-8")).get("score")
    except (OSError, ValueError, AttributeError):
        return None


class Damaged(UserError):
    """A checkpoint that is not what was written. An older one may be."""


def read_manifest(directory: Path) -> Manifest:
    """The manifest of a checkpoint directory.

    Raises:
        Damaged: it is missing or damaged. UserError: its format is not known to this version.
    """
    path = directory / MANIFEST
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise UserError(
                f"{path} has format {content['format']}; this version reads format {FORMAT}; "
                "load it with the version that wrote it"
            )
        return Manifest(**content)
    except FileNotFoundError:
        raise Damaged(
            f"{path} is missing; a complete checkpoint has one; name another checkpoint"
        ) from None
    except (ValueError, KeyError, TypeError):
        raise Damaged(
            f"{path} is damaged; expected the JSON object of a manifest; {REMEDY}"
        ) from None


def verify(directory: Path, manifest: Manifest, world: ProcessGroup) -> None:
    """Compare every file with the manifest; each rank reads its share of them. A collective.

    Raises:
        Damaged: a file is missing, has another size or another checksum; the message names it.
    """
    together(world, lambda: _verify_share(directory, manifest, world.rank(), world.size()))


def _verify_share(directory: Path, manifest: Manifest, rank: int, ranks: int) -> None:
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
