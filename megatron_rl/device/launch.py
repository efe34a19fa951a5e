"""Where this process stands among the ranks: the one reader of torchrun's variables. No torch."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Mapping

from megatron_rl.device.cores import usable_cores
from megatron_rl.errors import UserError


@dataclass(frozen=True)
class Launch:
    """The place of this process."""

    rank: int  #: 0..world_size-1, over all machines
    world_size: int
    local_rank: int  #: 0..local_world_size-1, on this machine
    local_world_size: int
    launched: bool  #: False: started by hand, one process without torchrun

    @property
    def cores(self) -> int:
        """Processor cores for this rank, at least 1: its share of what the process may use."""
        return max(1, usable_cores() // self.local_world_size)


def read_launch(environment: Mapping[str, str] = os.environ) -> Launch:
    """Read RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE; without them this is the only rank.

    Raises UserError when only some of the first three are set, one is no number, or a rank is not
    below its size.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    given = [name for name in names if name in environment]
    if not given:
        return Launch(rank=0, world_size=1, local_rank=0, local_world_size=1, launched=False)
    missing = [name for name in names if name not in environment]
    if missing:
        raise UserError(
            f"{given[0]} is set and {missing[0]} is not; expected all of {', '.join(names)}; "
            "start several ranks with torchrun, or unset them"
        )
    rank, world_size, local_rank = (_number(name, environment[name]) for name in names)
    local = environment.get("LOCAL_WORLD_SIZE", environment["WORLD_SIZE"])
    local_world_size = _number("LOCAL_WORLD_SIZE", local)
    if not (rank < world_size and local_rank < local_world_size <= world_size):
        raise UserError(
            f"RANK {rank} of WORLD_SIZE {world_size}, LOCAL_RANK {local_rank} of LOCAL_WORLD_SIZE "
            f"{local_world_size}; expected each rank below its size; start ranks with torchrun"
        )
    return Launch(rank, world_size, local_rank, local_world_size, launched=True)


def _number(name: str, text: str) -> int:
    if not text.isdecimal():
        raise UserError(f"{name} is {text!r}; expected a number; start several ranks with torchrun")
    return int(text)
