"""The place of this process among the ranks; the one reader of torchrun's variables. No torch."""

from __future__ import annotations

import ipaddress
import os
import re
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
    master: tuple[str, int] | None = None  #: rendezvous address (no brackets) and port

    @property
    def cores(self) -> int:
        """Processor cores for this rank, at least 1: its share of what the process may use."""
        return max(1, usable_cores() // self.local_world_size)


def read_launch(environment: Mapping[str, str] = os.environ) -> Launch:
    """Read RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT; without
    the first three this is the only rank.

    Raises UserError if only some of the first three are set, one is no number, a rank is not below
    its size, or address or port are invalid.
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
    master = _master(environment)
    return Launch(rank, world_size, local_rank, local_world_size, launched=True, master=master)


def split_address(text: str, name: str) -> tuple[str, int]:
    """``HOST:PORT`` -> (host, port). An IPv6 address may have brackets; the returned host has none.

    Raises:
        UserError: the text is no such pair; the message calls it ``name``.
    """
    host, _, port = text.rpartition(":")
    found = re.fullmatch(r"\[([^][]+)\]|([^][\s/]+)", host)
    bare = (found[1] or found[2]) if found is not None else ""
    right = bare and re.fullmatch("[0-9]{1,5}", port) and 0 < int(port) < 2**16
    if not right or (":" in host and not _is_ipv6(bare)):
        raise UserError(
            f"{name} is {text!r}; expected HOST:PORT, such as node0:29500 or [::1]:29500"
        )
    return bare, int(port)


def _is_ipv6(text: str) -> bool:
    """Whether the host is a whole IPv6 address. It is not, if its last group was read as the
    port.
    """
    try:
        ipaddress.IPv6Address(text)
    except ValueError:
        return False
    return True


def join_address(host: str, port: int) -> str:
    """``HOST:PORT``, as `split_address` reads it: an IPv6 address in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _master(environment: Mapping[str, str]) -> tuple[str, int] | None:
    host, port = environment.get("MASTER_ADDR", ""), environment.get("MASTER_PORT", "")
    if not (host or port):  # whoever connects finds that
        return None
    return split_address(f"{host}:{port}", "MASTER_ADDR:MASTER_PORT")


def _number(name: str, text: str) -> int:
    if not re.fullmatch("[0-9]{1,9}", text):
        raise UserError(f"{name} is {text!r}; expected a number; start several ranks with torchrun")
    return int(text)
