"""A vocabulary that tensor parallelism does not divide: rows of padding that no token can be."""

from __future__ import annotations

from torch.distributed import ProcessGroup


def padded_vocabulary(vocab_size: int, tensor_parallel: int) -> int:
    """The next multiple of the tensor-parallel size."""
    return -(-vocab_size // tensor_parallel) * tensor_parallel


def words_of(vocab_size: int, shard: int, group: ProcessGroup) -> int:
    """How many of this rank's rows are words: the last ranks' last rows are padding.

    Args:
        vocab_size: V. shard: rows of each rank. group: the tensor-parallel group.
    """
    return min(max(vocab_size - group.rank() * shard, 0), shard)
