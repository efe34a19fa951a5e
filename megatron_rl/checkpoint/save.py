"""Saving a checkpoint.

step_N/
  manifest.json    what it is of; size and SHA-256 of every other file, and its own
  state.json       the caller's state (data cursor, scheduler...)
  shards/          weights and optimizer state, in Megatron-Core's torch_dist format
  random/          rank_R.pt: random state of every rank

A run killed at any moment leaves a complete newest checkpoint: this one or the one before.
"""

from __future__ import annotations

import contextlib
import json
import math
import shutil
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Iterator, Sequence

import torch
from megatron.core.optimizer.optimizer import MegatronOptimizer
from torch.distributed import ProcessGroup

from megatron_rl.checkpoint.background import BackgroundWriter
from megatron_rl.checkpoint.directory import begin, publish, step_directory
from megatron_rl.checkpoint.identity import as_json
from megatron_rl.checkpoint.manifest import STATE, Manifest, fingerprints, write_manifest
from megatron_rl.checkpoint.optimizer_state import optimizer_shards, optimizer_step
from megatron_rl.checkpoint.random_state import RANDOM, random_file, save_random_state
from megatron_rl.checkpoint.torch_dist import shard_files, take_shards
from megatron_rl.models.gpt.chunk import Chunk, chunk_shards
from megatron_rl.parallel.collective_try import by_first, collective_try
from megatron_rl.parallel.groups import Groups

SHARDS = "shards"


def save_checkpoint(
    root: Path,
    step: int,
    *,
    chunks: Sequence[torch.nn.Module],
    optimizer: MegatronOptimizer | None,
    state: dict[str, Any],
    architecture: dict[str, Any],
    layout: dict[str, Any],
    groups: Groups,
    keep: int,
    keep_best: int = 0,
    score: float | None = None,
    background: BackgroundWriter | None = None,
) -> Path:
    """Write and publish ``root/step_N``, then delete all but the newest ``keep`` and the best; a
    collective over all ranks. Gives the checkpoint's directory.

    Args:
        root: directory of checkpoints, on storage that every rank sees.
        chunks: this rank's model chunks, bare.
        optimizer: None to save the weights alone.
        state: JSON-able; rank 0's is stored and given back by `load_checkpoint`.
        architecture, layout: of `identity`; a checkpoint of another architecture is not loaded.
        groups: the process groups.
        keep: newest complete checkpoints left over afterwards, this one included; at least 1.
        keep_best: complete checkpoints of the highest score left over beside them.
        score: of this step, higher is better; None: it has none.
        background: writes a copy in host memory, later; its ``wait`` raises what went wrong.

    Raises:
        OSError: writing failed; raised on all ranks, and nothing is published.
    """
    world, is_first = groups.world, groups.world.rank() == 0
    manifest = _manifest(step, as_json(architecture), as_json(layout), score)
    text = as_json(state)
    partial = by_first(world, lambda: _begin(root, step))

    def finish(files: dict[str, list[Any]]) -> None:
        write_manifest(partial, replace(manifest, optimizer_step=updates, files=files))
        publish(root, step, keep, keep_best)

    def write_and_publish(group: ProcessGroup) -> None:
        with _nothing_half_done(partial, is_first):
            write_shards(group)
            written = collective_try(group, lambda: _own_fingerprints(partial, group))
            files = {n: entry for entries in written for n, entry in sorted(entries.items())}
            collective_try(group, lambda: finish(files) if is_first else None)

    with _nothing_half_done(partial, is_first):
        updates = None if optimizer is None else optimizer_step(optimizer, world)
        shards = _shards(chunks, optimizer, groups)
        write_shards = take_shards(shards, partial / SHARDS, world, copy=background is not None)
        del shards
        collective_try(world, lambda: _write_small_files(partial, world.rank(), text))
    if background is None:
        write_and_publish(world)
    else:
        background.start(write_and_publish)
    return step_directory(root, step)


def _shards(
    chunks: Sequence[torch.nn.Module], optimizer: MegatronOptimizer | None, groups: Groups
) -> dict[str, Any]:
    """What this rank stores of weights and optimizer."""
    shards: dict[str, Any] = {"model": model_shards(chunks, groups)}
    if optimizer is not None:
        shards["optimizer"] = optimizer_shards(optimizer, shards["model"], loading=False)
    return shards


def _manifest(
    step: int, architecture: dict[str, Any], layout: dict[str, Any], score: float | None
) -> Manifest:
    """Without what is known when all is written."""
    versions = {name: version(name) for name in ("torch", "megatron-core")}
    known = score if score is not None and math.isfinite(score) else None
    return Manifest(step, architecture, layout, None, {}, versions, known)


@contextlib.contextmanager
def _nothing_half_done(partial: Path, is_first: bool) -> Iterator[None]:
    """Remove what was written where it could not be finished: the room is needed by others."""
    try:
        yield
    except OSError:
        if is_first:
            shutil.rmtree(partial, ignore_errors=True)
        raise


def model_shards(chunks: Sequence[Chunk], groups: Groups) -> dict[str, Any]:
    """The chunks' tensors as shards of the whole model's: number of the chunk -> name -> shard."""
    return {str(number): chunk_shards(chunk, groups) for number, chunk in enumerate(chunks)}


def _begin(root: Path, step: int) -> Path:
    partial = begin(root, step)
    (partial / SHARDS).mkdir()
    (partial / RANDOM).mkdir()
    return partial


def _write_small_files(partial: Path, rank: int, state: dict[str, Any]) -> None:
    """This rank's random state and, on rank 0, the caller's state: as they are now."""
    save_random_state(random_file(partial, rank))
    if rank == 0:
        (partial / STATE).write_text(json.dumps(state, indent=1), encoding="utf-8")


def _own_fingerprints(partial: Path, group: ProcessGroup) -> dict[str, list[Any]]:
    """Of the files that this rank wrote."""
    own = [*shard_files(partial / SHARDS), random_file(partial, group.rank())]
    return fingerprints(partial, [*own, partial / STATE] if group.rank() == 0 else own)
