"""The verb `convert`: a Hugging Face directory to a Megatron checkpoint, and back. Needs no GPU.

A Megatron checkpoint does not depend on a layout, so one process can convert for any; several,
under torchrun, share the work and the memory. What is converted to is laid out like a run's
directory (config.yaml, checkpoints/step_0, hf/), so that `checkpoint.init_from` and `convert` take
it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path
from typing import Any, Callable, Iterable, Iterator, TypeVar

from megatron_rl.checkpoint.directory import find_checkpoint
from megatron_rl.checkpoint.identity import architecture_of, layout_of
from megatron_rl.checkpoint.manifest import read_manifest
from megatron_rl.checkpoint.save import save_checkpoint
from megatron_rl.config.hf_config import family_of, model_type_of
from megatron_rl.config.load import dump_config
from megatron_rl.config.schema import Config, ModelConfig
from megatron_rl.config.yaml_text import read_yaml
from megatron_rl.device.launch import Launch
from megatron_rl.device.select import Device, joined, select_device
from megatron_rl.errors import UserError, shown
from megatron_rl.families.common.family import Family
from megatron_rl.models.build import build_chunks, transformer_config
from megatron_rl.parallel.collective_try import collective_try
from megatron_rl.parallel.groups import Groups, build_groups, destroy_groups
from megatron_rl.weights.export import describe
from megatron_rl.weights.from_hugging_face import load_hf_weights
from megatron_rl.weights.side_files import keep_side_files, kept_side_files
from megatron_rl.weights.source import HuggingFaceTensors
from megatron_rl.weights.stored import StoredWeights
from megatron_rl.weights.verify import refuse_unknown_to_transformers, verify
from megatron_rl.weights.writer import (
    SHARD_BYTES,
    partial_of,
    refuse_existing,
    write_hf_directory,
)

Item = TypeVar("Item")
#: Shows how far an iteration over so many items is.
Progress = Callable[[Iterable[Item], int, str], Iterable[Item]]


def to_megatron(
    config: Config, target: Path, launch: Launch, progress: Progress[Any], verified: bool
) -> None:
    """Convert ``config.model.hf_path`` to a checkpoint in the new directory ``target``.

    Args:
        config: of the model; its parallel section is the layout of the ranks that convert.
        target: appears by one rename when all is written.
        launch: this process.
        progress: wraps what takes long.
        verified: compare the result with the source; see `verify`.

    Raises:
        UserError: the source is not understood or damaged, the target exists, or there is no room
            for it. RunFailed: the result is not the source.
    """
    source = config.model.hf_path
    assert source is not None, "what is converted"
    with _ranks(config, launch) as (device, groups), _tidied(target, launch):
        world, first = groups.world, launch.rank == 0
        if verified:
            collective_try(world, lambda: refuse_unknown_to_transformers(model_type_of(source)))
        sizes = collective_try(world, lambda: HuggingFaceTensors(source).num_bytes)
        collective_try(world, lambda: _prepare(target, sizes[0]) if first else None)
        transformer = transformer_config(config.model, config.parallel, device)
        chunks = build_chunks(config.model, transformer, groups, device, seed=None)
        load_hf_weights(chunks, groups, config.model, source, progress)
        partial = partial_of(target)
        save_checkpoint(
            partial / "checkpoints",
            0,
            chunks=chunks,
            optimizer=None,
            state={},
            architecture=architecture_of(config.model),
            layout=layout_of(config.parallel, launch.world_size),
            groups=groups,
            keep=1,
        )

        def finish() -> None:
            (partial / "config.yaml").write_text(dump_config(config), encoding="utf-8")
            keep_side_files(source, partial)
            os.rename(partial, target)

        collective_try(world, lambda: finish() if first else None)
        if verified:
            verify(find_checkpoint(target), source, config, groups, device, progress)


def to_hugging_face(
    source: Path,
    target: Path,
    config: Config,
    launch: Launch,
    progress: Progress[Any],
    *,
    like: Path | None,
    shard_bytes: int = SHARD_BYTES,
    verified: bool = False,
) -> None:
    """Convert a run (its newest checkpoint) or a checkpoint to a Hugging Face directory.

    The model is not built: each rank reads its share of the stored tensors one after the other.

    Args:
        source: a run's directory, its checkpoints directory, or a step_N in it.
        target: a new directory.
        config: device and layout of the ranks that convert; of its model section only ``family`` is
            looked at, which goes before that of the run.
        launch: this process.
        progress: wraps what takes long.
        like: a model directory whose config.json and tokenizer files the result gets; None: those
            the run started with, if any.
        shard_bytes: most bytes of tensors in a file.
        verified: compare the result with the source; see `verify`.

    Raises: as `to_megatron`.
    """
    with _ranks(config, launch) as (device, groups), _tidied(target, launch):
        world, first = groups.world, launch.rank == 0
        checkpoint, model, origin = collective_try(
            world, lambda: _stored_model(source, like, config.model.family)
        )[0]
        found: list[tuple[Family, dict[str, Any]]] = []  # not gathered: a family holds functions
        collective_try(world, lambda: found.append(describe(model, origin)))
        ((family, described),) = found
        if verified:
            collective_try(world, lambda: refuse_unknown_to_transformers(described["model_type"]))
        weights = StoredWeights(checkpoint, model, family)
        collective_try(world, lambda: _prepare_hf(target, weights.num_bytes) if first else None)
        mine = weights.stream(launch.rank, launch.world_size)
        count = weights.num_tensors(launch.rank, launch.world_size)
        write_hf_directory(
            target,
            progress(mine, count, "converting"),
            described,
            world,
            like=origin,
            shard_bytes=shard_bytes,
        )
        if verified:
            of_model = config.model_copy(update={"model": model})
            verify(checkpoint, target, of_model, groups, device, progress)


@contextlib.contextmanager
def _ranks(config: Config, launch: Launch) -> Iterator[tuple[Device, Groups]]:
    """The ranks joined; undone at the end."""
    device = select_device(config.device, launch)
    with joined(device, launch, config.device):
        groups = build_groups(config.parallel)
        try:
            yield device, groups
        finally:
            destroy_groups()


@contextlib.contextmanager
def _tidied(target: Path, launch: Launch) -> Iterator[None]:
    """What cannot be written is a user's error, and leaves nothing behind."""
    try:
        yield
    except (OSError, UserError) as error:
        if launch.rank == 0:
            shutil.rmtree(partial_of(target), ignore_errors=True)
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"{target} could not be written ({error}); expected room and permission for it; make "
            "room or choose another place"
        ) from error


def _prepare(target: Path, num_bytes: int) -> None:
    _prepare_hf(target, num_bytes)
    partial = partial_of(target)
    shutil.rmtree(partial, ignore_errors=True)  # of a conversion that was killed
    partial.mkdir(parents=True)
    if target.exists():
        target.rmdir()  # empty


def _prepare_hf(target: Path, num_bytes: int) -> None:
    """Refuse a target that exists or has no room, before anything is written."""
    refuse_existing(target)
    parent = target.absolute().parent
    while not parent.exists():
        parent = parent.parent
    if not os.access(parent, os.W_OK) or os.statvfs(parent).f_flag & os.ST_RDONLY:
        raise UserError(f"{parent} is read-only; expected to write {target} there; choose another")
    free = shutil.disk_usage(parent).free
    if free < num_bytes:
        raise UserError(
            f"{parent} has {free:,} bytes free; expected {num_bytes:,} for {target}; make room or "
            "choose another disk"
        )


def _stored_model(
    source: Path, like: Path | None, named: str | None
) -> tuple[Path, ModelConfig, Path | None]:
    """The checkpoint, its model, and the directory whose small files the result gets."""
    checkpoint = find_checkpoint(source)
    architecture = read_manifest(checkpoint).architecture
    run_dir = checkpoint.parent.parent
    config_file = run_dir / "config.yaml"
    longest, family = _longest_and_family(config_file)
    model = ModelConfig(**architecture, max_sequence_length=longest, family=named or family)
    if like is not None:
        family_of(like, model.family)  # it has a config.json
    return checkpoint, model, like or kept_side_files(run_dir)


def _longest_and_family(config_file: Path) -> tuple[int, str | None]:
    """What a run's config says of its model beyond the architecture that is with a checkpoint."""
    try:
        values, _ = read_yaml(config_file)
        longest, family = values["model"]["max_sequence_length"], values["model"].get("family")
        if type(longest) is not int or longest < 2:
            raise TypeError(f"it is {shown(longest)}")
        return longest, family if isinstance(family, str) else None
    except (UserError, KeyError, TypeError) as error:
        raise UserError(
            f"{config_file} says no model.max_sequence_length ({error}); expected the resolved "
            "config of the run, beside its checkpoints; convert from the run's directory"
        ) from error
