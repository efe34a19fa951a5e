"""Reading and writing Megatron-Core's torch_dist format in the calling process."""

from __future__ import annotations

import contextlib
import itertools
import shutil
import warnings
from functools import cached_property
from pathlib import Path
from typing import Any, Callable

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.mapping import ShardedBase, ShardedTensor
from megatron.core.dist_checkpointing.strategies import torch as megatron_torch
from torch.distributed import ProcessGroup, checkpoint
from torch.distributed.checkpoint.api import CheckpointException

from megatron_rl.checkpoint.safe_index import check_index
from megatron_rl.config.estimate import size_text
from megatron_rl.errors import UserError
from megatron_rl.parallel.collective_try import collective_try


class InProcessSave(megatron_torch.TorchDistSaveShardedStrategy):
    """Megatron's strategy for the torch_dist format, written by torch's own writer in this process.

    Megatron 0.16 writes even a synchronous save in forked processes that answer through the queue
    of a spawned manager. That one imports the main module again: 3 to 10 s at the first save, and a
    hang where the main module has no guard (or psutil is missing). The files are the same. Can go
    when Megatron writes synchronous saves in the process itself.
    """

    def __init__(self, copy: bool) -> None:
        """copy: of the tensors, so that they may change before `write` is called."""
        super().__init__("torch_dist", 1, thread_count=1)
        self._copy = copy
        self._shards: dict[str, list[ShardedBase]] = {}
        self._directory = ""

    def save(self, sharded_state_dict: dict[str, Any], checkpoint_dir: str | Path) -> None:
        """Take the shards this rank is the main replica of; `write` writes them."""
        self._shards, _, _ = megatron_torch._replace_state_dict_keys_with_sharded_keys(
            sharded_state_dict, self.keep_only_main_replica
        )
        self._directory = str(checkpoint_dir)
        if self._copy:
            for shard in itertools.chain.from_iterable(self._shards.values()):
                if isinstance(shard, ShardedTensor):
                    shard.data = shard.data.detach().to("cpu", copy=True)

    def write(self, group: ProcessGroup) -> None:
        """The shards, and on rank 0 the index of all. A collective over the group, all ranks.

        Raises:
            OSError: writing failed on some rank.
        """
        try:
            checkpoint.save(
                megatron_torch.mcore_to_pyt_state_dict(self._shards, False),
                # Syncing is left to the checksum pass, which opens every file anyway.
                storage_writer=checkpoint.FileSystemWriter(
                    self._directory, thread_count=1, sync_files=False
                ),
                planner=megatron_torch.MCoreSavePlanner(
                    dedup_replicated_tensors=False, flatten_state_dict=False
                ),
                process_group=group,
            )
        except CheckpointException as error:  # a BaseException, which 'except Exception' misses
            _raise_what_is_no_fault(error, (OSError, RuntimeError))
            raise _not_written(Path(self._directory), error) from error
        finally:
            self._shards = {}


def take_shards(
    sharded: dict[str, Any], directory: Path, world: ProcessGroup, copy: bool
) -> Callable[[ProcessGroup], None]:
    """Check that the shards of all ranks make whole tensors; what comes back writes them into the
    existing, empty directory, see `InProcessSave`. A collective over all ranks.

    Raises:
        OSError: writing failed; on all ranks.
    """
    strategy, failures = InProcessSave(copy), []
    try:
        dist_checkpointing.save(sharded, str(directory), sharded_strategy=strategy)
    except (OSError, RuntimeError) as error:  # torch.save raises RuntimeErrors
        if world.rank() > 0:
            raise
        # Rank 0 has small files of its own to write; the others are in Megatron's last barrier.
        dist.barrier()
        failures.append(_not_written(directory, error))

    def report() -> None:
        for failure in failures:
            raise failure

    collective_try(world, report)
    return strategy.write


def read_shards(sharded: dict[str, Any], directory: Path) -> dict[str, Any]:
    """The stored values of the shards asked for, in their structure. A collective, all ranks.

    Raises:
        UserError: one is not stored, or has another shape.
    """
    try:
        with warnings.catch_warnings():  # Megatron calls a function torch is about to rename
            warnings.simplefilter("ignore", FutureWarning)
            return dist_checkpointing.load(sharded, str(directory))
    except (CheckpointException, CheckpointingException) as error:
        _raise_what_is_no_fault(error, (Exception,))
        raise UserError(
            f"{directory} does not hold what model and optimizer need ({_first_reason(error)}); "
            "expected the same trained parameters; resume with the configuration it was written "
            "with, or start a new run from its weights with checkpoint.init_from"
        ) from error


class _OnceRead(checkpoint.FileSystemReader):
    """A reader that keeps the index: it is asked for it at every load."""

    @cached_property
    def _index(self) -> Any:
        return super().read_metadata()

    def read_metadata(self, *_: Any, **__: Any) -> Any:
        return self._index


class StoredTensors:
    """The whole tensors of a shard directory by key, each read when it is asked for, in this
    process alone.

    Raises:
        Damaged: the directory's index is none.
    """

    def __init__(self, directory: Path) -> None:
        check_index(directory)
        self._directory = directory
        self._reader = _OnceRead(directory)
        entries = self._reader.read_metadata().state_dict_metadata
        self._entries = {key: e for key, e in entries.items() if hasattr(e, "size")}

    @property
    def shapes(self) -> dict[str, torch.Size]:
        """Key -> shape of every tensor, those of the optimizer included."""
        return {key: entry.size for key, entry in self._entries.items()}

    def bytes_of(self, key: str) -> int:
        """What a tensor takes in memory."""
        entry = self._entries[key]
        return entry.size.numel() * entry.properties.dtype.itemsize

    def get(self, key: str) -> torch.Tensor:
        """The tensor, put together from its shards. UserError: it cannot be read."""
        entry = self._entries[key]
        found = {key: torch.empty(entry.size, dtype=entry.properties.dtype)}
        with warnings.catch_warnings():  # that it loads in a single process, as asked
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            try:
                checkpoint.load(found, storage_reader=self._reader, no_dist=True)
            except CheckpointException as error:
                _raise_what_is_no_fault(error, (Exception,))
                raise UserError(
                    f"{key} of {self._directory} cannot be read ({_first_reason(error)}); expected "
                    "what was written; restore its files from a copy"
                ) from error
        return found[key]


def shard_files(directory: Path) -> list[Path]:
    """The files of a shard directory that this rank wrote; on rank 0 with the index files."""
    own, rank = f"__{dist.get_rank()}_", dist.get_rank()
    return [
        path
        for path in sorted(directory.iterdir())
        if path.name.startswith(own) or (rank == 0 and not path.name.startswith("__"))
    ]


def _raise_what_is_no_fault(error: BaseException, faults: tuple[type[BaseException], ...]) -> None:
    """torch takes whatever any rank meets, Ctrl-C included, for a failure of the checkpoint; here
    that and everything but ``faults`` goes on as what it is.
    """
    if not isinstance(error, CheckpointException):
        return
    met = [failure[0] for failure in error.failures.values()]
    for one in met:
        if not isinstance(one, Exception):  # KeyboardInterrupt: on all ranks
            raise one
    for one in met:
        if not isinstance(one, faults):  # a mistake of the program
            raise RuntimeError(f"a checkpoint failed: {one!r}") from one


def _not_written(directory: Path, error: BaseException) -> OSError:
    """With the room there is: torch says of a full disk no more than "iostream error".

    Another rank may have removed the directory by now; the room is the same above it.
    """
    room = ""
    for place in (directory, *directory.parents):
        with contextlib.suppress(OSError):
            room = f" ({size_text(shutil.disk_usage(place).free)} free there)"
            break
    return OSError(f"{directory} could not be written{room}: {_first_reason(error)}")


def _first_reason(error: BaseException) -> str:
    """The innermost message, on one line of bearable length."""
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else text[:200] + "..."
