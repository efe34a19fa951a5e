"""What a run reads, by content: data, tokenizer, model, start weights and a user's own code."""

from __future__ import annotations

import errno
import functools
import hashlib
from pathlib import Path

from megatron_rl.checkpoint.directory import find_checkpoint
from megatron_rl.checkpoint.manifest import MANIFEST
from megatron_rl.config.checks import input_files
from megatron_rl.config.own_code import own_code
from megatron_rl.config.schema import Config
from megatron_rl.data.tokenizer_files import BESIDE
from megatron_rl.errors import UserError
from megatron_rl.files import reason

#: Weights in a directory count by their size and their beginning: names, types, first values.
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
_BEGINNING = 1 << 22
#: (file, size, time of its last change in ns): a file is read again if these differ.
_Key = tuple[Path, int, int]


def contents_of(config: Config, verb: str, made: Path | None = None) -> dict[str, str]:
    """SHA-256 of each file or directory that a run reads, by the field that names it, and of each
    file of a user's own, by reference.

    Datasets of a hub count by name alone, and so do modules that a user's own file imports.

    Args:
        made: left out: a directory that another run of the study makes.

    Raises:
        UserError: one that cannot be read.
    """
    model, tokenizer = config.model, config.data.tokenizer.path
    named = {
        **input_files(config),
        "model.hf_path": model.hf_path,
        "model.hf_config": model.hf_config,
    }
    if tokenizer is not None and tokenizer.suffix == ".json":
        named |= {f"data.tokenizer.{name}": tokenizer.with_name(name) for name in BESIDE}
    found = own_code(config, verb)
    for name, path in named.items():
        if path is None or path == made or not path.exists():
            continue
        starts = name == "checkpoint.init_from"
        try:
            found[name] = _of_checkpoint(path) if starts else _of_path(path)
        except OSError as error:
            raise UserError(
                f"{name}: {path} cannot be read ({reason(error)}); expected a file or directory "
                "that the run can read; correct its rights or the path"
            ) from error
    return found


def _of_path(path: Path) -> str:
    if not path.is_dir():
        if not path.is_file():  # a device is read without end, and a pipe's content is lost
            raise OSError(errno.EINVAL, "not a regular file")
        return _sha256(_key(path), whole=True)
    inside = sorted(one for one in path.rglob("*") if one.is_file())
    lines = [
        f"{one.relative_to(path).as_posix()} {_sha256(_key(one), whole=one.suffix not in _WEIGHTS)}"
        for one in inside
    ]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _of_checkpoint(path: Path) -> str:
    """The checkpoint that is loaded, by its manifest, which has the SHA-256 of every other file."""
    try:
        return _of_path(find_checkpoint(path) / MANIFEST)
    except UserError:  # there is none: the run says so
        return _of_path(path)


def _key(path: Path) -> _Key:
    status = path.stat()
    return path.resolve(), status.st_size, status.st_mtime_ns


@functools.lru_cache(maxsize=1 << 16)
def _sha256(key: _Key, whole: bool) -> str:
    path, size, _ = key
    found = hashlib.sha256(f"{size} ".encode())
    with path.open("rb") as file:
        if not whole:
            found.update(file.read(_BEGINNING))
        while whole and (block := file.read(_BEGINNING)):
            found.update(block)
    return found.hexdigest()
