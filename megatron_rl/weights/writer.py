"""Writing a Hugging Face model directory, a shard at a time; it appears whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any, Iterable, Sequence

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch.distributed import ProcessGroup

from megatron_rl.errors import UserError
from megatron_rl.parallel.collective_try import collective_try
from megatron_rl.weights.rules import alone
from megatron_rl.weights.side_files import copy_side_files
from megatron_rl.weights.source import INDEX

SHARD_BYTES = 1 << 30


class _Shards:
    """The shards that one rank writes; holds at most one shard's tensors."""

    def __init__(self, directory: Path, rank: int, shard_bytes: int) -> None:
        self._directory, self._rank, self._limit = directory, rank, shard_bytes
        self._waiting: dict[str, torch.Tensor] = {}
        self._size = 0
        self.written: list[tuple[str, list[str], int]] = []  #: file, its tensors, their bytes

    def add(self, name: str, tensor: torch.Tensor) -> None:
        size = tensor.numel() * tensor.element_size()
        if self._waiting and self._size + size > self._limit:
            self.flush()
        self._waiting[name] = alone(tensor.cpu())
        self._size += size

    def flush(self) -> None:
        if not self._waiting:
            return
        file = f"rank-{self._rank:05d}-{len(self.written):05d}.safetensors"
        try:
            save_file(self._waiting, self._directory / file, metadata={"format": "pt"})
        except (SafetensorError, OSError) as error:
            raise OSError(f"{self._directory / file} could not be written: {error}") from error
        self.written.append((file, list(self._waiting), self._size))
        self._waiting, self._size = {}, 0


def write_hf_directory(
    target: Path,
    tensors: Iterable[tuple[str, torch.Tensor]],
    config: dict[str, Any],
    world: ProcessGroup,
    *,
    like: Path | None = None,
    shard_bytes: int = SHARD_BYTES,
    replace: bool = False,
) -> None:
    """Write config.json, safetensors shards and their index. A collective over all ranks.

    Args:
        target: the directory, on storage that every rank sees; it must not exist, unless
            ``replace``. It gets its name by one rename, when everything is on the disk.
        tensors: this rank's (name, tensor); each name comes from one rank. Consumed once; the ranks
            may have to take part in it together.
        config: content of config.json, where ``like`` has none.
        world: all ranks.
        like: a model directory whose config.json and tokenizer files are copied verbatim.
        shard_bytes: most bytes of tensors in a file (a larger tensor has a file of its own).
        replace: overwrite a directory of the same name.

    Raises:
        UserError: the target exists. OSError: writing failed; on all ranks. No target then.
    """
    rank = world.rank()
    partial = partial_of(target)
    collective_try(world, lambda: _begin(target, partial, replace) if rank == 0 else None)
    shards = _Shards(partial, rank, shard_bytes)
    failure: OSError | None = None
    for name, tensor in tensors:
        if failure is None:
            try:
                shards.add(name, tensor)
            except OSError as error:  # the others still need this rank's part in the gathers
                failure = error

    def finish_own() -> list[Any]:
        if failure is not None:
            raise failure
        shards.flush()
        return shards.written

    try:
        written = collective_try(world, finish_own)
        collective_try(
            world,
            lambda: (
                _publish(target, partial, sum(written, []), config, like, replace)
                if rank == 0
                else None
            ),
        )
    except OSError:
        if rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
        raise


def partial_of(target: Path) -> Path:
    """Where a target is written before it gets its name."""
    return target.with_name(f".{target.name}.partial")


def refuse_existing(target: Path) -> None:
    """UserError where there is something already that a conversion would overwrite."""
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(
            f"{target} exists already; expected a new directory; remove it or choose another"
        )


def _begin(target: Path, partial: Path, replace: bool) -> None:
    if not replace:
        refuse_existing(target)
    if partial.exists():  # of a run that was killed
        shutil.rmtree(partial)
    partial.mkdir(parents=True)


def _publish(
    target: Path,
    partial: Path,
    written: Sequence[tuple[str, list[str], int]],
    config: dict[str, Any],
    like: Path | None,
    replace: bool,
) -> None:
    weight_map: dict[str, str] = {}
    for number, (file, names, _) in enumerate(written, start=1):
        final = f"model-{number:05d}-of-{len(written):05d}.safetensors"
        os.rename(partial / file, partial / final)
        doubles = weight_map.keys() & set(names)
        if doubles:
            raise AssertionError(f"{min(doubles)} was written by two ranks")
        weight_map.update(dict.fromkeys(names, final))
    index = {
        "metadata": {"total_size": sum(size for _, _, size in written)},
        "weight_map": dict(sorted(weight_map.items())),
    }
    _write_json(partial / INDEX, index)
    copied = [] if like is None else copy_side_files(like, partial)
    if "config.json" not in copied:
        _write_json(partial / "config.json", config)
    for path in partial.iterdir():
        _sync(path)
    _sync(partial)
    if replace and target.exists():
        shutil.rmtree(target)
    elif target.exists():
        target.rmdir()  # empty
    os.rename(partial, target)
    _sync(target.parent)


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
