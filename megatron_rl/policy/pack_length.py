"""How long packs are: long enough for a mini-batch in few packs, and no longer."""

from __future__ import annotations

from typing import Callable, Sequence

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from megatron_rl.data.shared_prompts import round_up
from megatron_rl.parallel.collectives import all_reduce

#: Lengths that are tried at most; all ranks try the same ones.
TRIALS = 16


def shortest_length(
    packs_at: Callable[[int], int],
    longest: int,
    least: int,
    most: int,
    multiple: int,
    num_packs: int,
    ranks: ProcessGroup,
    device: torch.device,
) -> int:
    """The shortest length tried at which no rank needs more than ``num_packs`` packs. A collective.

    Packs that are longer than that leave the last of them mostly padding, which costs as much as
    tokens do.

    Args:
        packs_at: length -> packs that this rank's largest mini-batch needs.
        longest: rows of this rank's longest sequence.
        least: a length below which the rows of no rank fit; alike on all ranks.
        most: a length at which ``num_packs`` suffice on each; alike on all ranks.
        multiple: of which ``most`` is one, and the result.
        num_packs: of each mini-batch.
    """
    lengths = _lengths(round_up(least, multiple), most, multiple)
    needed = [packs_at(length) if length >= longest else num_packs + 1 for length in lengths]
    worst = all_reduce(torch.tensor(needed, device=device), ranks, dist.ReduceOp.MAX).tolist()
    return min((n for n, count in zip(lengths, worst) if count <= num_packs), default=most)


def _lengths(least: int, most: int, multiple: int) -> Sequence[int]:
    """At most `TRIALS` lengths from ``least`` on, below ``most``, evenly apart."""
    steps = -(-(most - least) // multiple)
    return range(least, most, multiple * max(1, -(-steps // TRIALS)))
