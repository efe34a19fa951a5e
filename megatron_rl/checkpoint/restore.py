"""Loading a checkpoint: all of it to go on with a run, or the weights to start from."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Sequence

import torch
from megatron.core.optimizer.optimizer import MegatronOptimizer

from megatron_rl.checkpoint.directory import find_checkpoint
from megatron_rl.checkpoint.identity import as_json, check_architecture
from megatron_rl.checkpoint.manifest import (
    REMEDY,
    STATE,
    Damaged,
    Manifest,
    read_manifest,
    read_state,
    verify,
)
from megatron_rl.checkpoint.optimizer_state import optimizer_shards, restore_optimizer
from megatron_rl.checkpoint.random_state import load_random_state, random_file
from megatron_rl.checkpoint.safe_index import check_index
from megatron_rl.checkpoint.save import SHARDS, model_shards
from megatron_rl.checkpoint.torch_dist import read_shards
from megatron_rl.errors import UserError
from megatron_rl.parallel.collective_try import collective_try
from megatron_rl.parallel.groups import Groups


def load_checkpoint(
    path: Path,
    *,
    chunks: Sequence[torch.nn.Module],
    optimizer: MegatronOptimizer | None,
    architecture: dict[str, Any],
    layout: dict[str, Any],
    groups: Groups,
) -> dict[str, Any]:
    """Restore weights, optimizer and random state from ``step_N``. A collective over all ranks.

    At the layout it was written at, everything comes back bit for bit. At another one the weights
    and the optimizer state do, and the random state stays as the caller seeded it: the stored one
    belongs to ranks that are no more. Learning rate and weight decay are not part of a checkpoint:
    they come from the configuration and the caller's scheduler.

    Args:
        path: a checkpoint (`directory.newest_checkpoint`).
        chunks: this rank's model chunks, bare, filled in place.
        optimizer: the optimizer over the chunks, filled in place; None: restore all but it (one
            that exists then needs its ``reload_model_params``).
        architecture: of the model in ``chunks``.
        layout: of this run.
        groups: the process groups.

    Returns:
        The ``state`` given to `save_checkpoint`.

    Raises:
        UserError: another architecture (naming the fields), a missing or damaged file (naming it),
            or no state for the optimizer. Nothing has been changed then.
    """
    manifest = _checked(path, architecture, groups, ignore=())
    if optimizer is not None and manifest.optimizer_step is None:
        raise UserError(
            f"{path} holds weights only; resuming needs the optimizer's state as well; "
            "start a new run from it with checkpoint.init_from"
        )
    state = collective_try(groups.world, lambda: _state_of(path, manifest))[0]
    sharded = {"model": model_shards(chunks, groups)}
    if optimizer is not None:
        sharded["optimizer"] = optimizer_shards(optimizer, sharded["model"], loading=True)
    loaded = read_shards(sharded, path / SHARDS)
    _fill(chunks, loaded["model"])
    if optimizer is not None and manifest.optimizer_step is not None:
        restore_optimizer(optimizer, loaded["optimizer"], manifest.optimizer_step)
    if manifest.layout == as_json(layout):
        load_random_state(random_file(path, groups.world.rank()))
    return state


def load_weights(
    path: Path, *, chunks: Sequence[torch.nn.Module], architecture: dict[str, Any], groups: Groups
) -> Path:
    """Fill the chunks with a checkpoint's weights and nothing else. A collective over all ranks.

    At any layout, and in the chunks' own dtype. An optimizer that exists already may hold its own
    fp32 copy of the weights: call its ``reload_model_params`` afterwards.

    Args:
        path: a run directory or a directory of checkpoints (their newest), or one checkpoint.
        chunks: this rank's model chunks, bare, filled in place.
        architecture: of the model in ``chunks``; its ``dtype`` may differ from the checkpoint's.
        groups: the process groups.

    Returns:
        The checkpoint that was read.

    Raises:
        UserError: there is no checkpoint, it is of another architecture, or a file is missing or
            damaged.
    """
    found = find_checkpoint(path)
    _checked(found, architecture, groups, ignore=("dtype",))
    loaded = read_shards({"model": model_shards(chunks, groups)}, found / SHARDS)
    _fill(chunks, loaded["model"])
    return found


def _checked(
    path: Path, architecture: dict[str, Any], groups: Groups, ignore: tuple[str, ...]
) -> Manifest:
    def check() -> Manifest:
        manifest = read_manifest(path)
        check_architecture(manifest.architecture, architecture, str(path), ignore)
        return manifest

    manifest = collective_try(groups.world, check)[0]
    verify(path, manifest, groups.world)
    is_first = groups.world.rank() == 0
    collective_try(groups.world, lambda: check_index(path / SHARDS) if is_first else None)
    return manifest


def _state_of(path: Path, manifest: Manifest) -> dict[str, Any]:
    state = read_state(path)
    if state.get("step", manifest.step) != manifest.step:
        raise Damaged(
            f"{path / STATE} is of step {state['step']!r}, the manifest of {manifest.step}; "
            f"expected one step; {REMEDY}"
        )
    return state


def _fill(chunks: Sequence[torch.nn.Module], loaded: dict[str, Any]) -> None:
    for number, chunk in enumerate(chunks):
        result = chunk.load_state_dict(loaded[str(number)], strict=False)
        # `model_shards` leaves these out.
        missing = [name for name in result.missing_keys if not name.endswith("._extra_state")]
        assert not missing and not result.unexpected_keys, (missing, result.unexpected_keys)
