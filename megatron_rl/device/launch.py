"""Where this process stands among the ranks. The only reader of the variables that torchrun sets; no torch here."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Mapping


@dataclass(frozen=True)
class Launch:
    """The place of this process."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    launched: bool  #: False: started by hand, one process without torchrun


def read_launch(environment: Mapping[str, str] = os.environ) -> Launch:
    """Read RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE; without them this is the only rank."""
    if "RANK" not in environment:
        return Launch(rank=0, world_size=1, local_rank=0, local_world_size=1, launched=False)
    world_size = int(environment["WORLD_SIZE"])
    return Launch(
        rank=int(environment["RANK"]),
        world_size=world_size,
        local_rank=int(environment.get("LOCAL_RANK", 0)),
        local_world_size=int(environment.get("LOCAL_WORLD_SIZE", world_size)),
        launched=True,
    )
