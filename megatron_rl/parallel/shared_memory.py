"""Memory that the ranks of one machine share, and a place where they wait for each other.

gloo sends tensors through sockets and its threads, also between two processes of one machine.
Memory is several times faster, and a byte through a socket tells the other rank that it may read.
"""

from __future__ import annotations

import mmap
import os
import socket
import uuid
from pathlib import Path

import torch
from torch.distributed import ProcessGroup

from megatron_rl.parallel.collectives import gather_objects

#: Where files are memory.
DIRECTORY = Path("/dev/shm")


class SharedMemory:
    """A slot of memory for each rank of a group, which all of them read and write."""

    def __init__(
        self, memory: mmap.mmap, group: ProcessGroup, peers: dict[int, socket.socket]
    ) -> None:
        """peers: for each other rank of the group the socket that leads to it."""
        #: by rank, fp32 [N]
        self.slots = torch.frombuffer(memory, dtype=torch.float32).chunk(group.size())
        self.rank, self.others = group.rank(), tuple(sorted(peers))
        self._peers = peers

    def meet(self) -> None:
        """Wait until all ranks are here: what each wrote before, all may read. A collective.

        Raises:
            RuntimeError: another rank is gone or silent, in the words of gloo.
        """
        try:
            for rank in self.others:
                self._peers[rank].sendall(b"x")
            for rank in self.others:
                if not self._peers[rank].recv(1):
                    raise RuntimeError(f"Connection closed by peer, rank {rank} of the group")
        except TimeoutError as error:
            raise RuntimeError(f"Timed out waiting for rank {rank} of the group") from error
        except OSError as error:  # a broken pipe, a reset connection
            raise RuntimeError(f"{error.strerror}, rank {rank} of the group") from error


def share_memory(group: ProcessGroup, num_bytes: int, timeout_s: float) -> SharedMemory | None:
    """Memory for the ranks of a group; None on all of them: they are on several machines, or in
    containers that share none, or there is too little. A collective.

    Args:
        group: at least two ranks.
        num_bytes: of a slot, rounded up to whole pages; the same on all ranks.
        timeout_s: `SharedMemory.meet` waits no longer.
    """
    page = mmap.ALLOCATIONGRANULARITY
    total = -(-num_bytes // page) * page * group.size()
    path = DIRECTORY / f"megatron_rl-{uuid.uuid4().hex}"
    memory = _mapped(path, total, create=True) if group.rank() == 0 else None
    first, *_ = gather_objects(path if memory is not None else None, group)
    if first is not None and memory is None:
        memory = _mapped(first, total, create=False)
    mine = path.with_suffix(f".{group.rank()}")
    door = _door(mine, group.size()) if memory is not None else None
    doors = gather_objects(mine if door is not None else None, group)
    try:
        if memory is None or door is None or None in doors:
            return None
        return SharedMemory(memory, group, _connected(door, doors, group, timeout_s))
    finally:
        gather_objects(None, group)  # all are connected
        mine.unlink(missing_ok=True)
        path.unlink(missing_ok=True)  # the memory stays for those that have it


def _mapped(path: Path, num_bytes: int, *, create: bool) -> mmap.mmap | None:
    """A file as memory; None: it is not to be had."""
    try:
        file = os.open(path, os.O_RDWR | (os.O_CREAT | os.O_EXCL if create else 0), 0o600)
    except OSError:
        return None
    try:
        if create:  # if there were no room later, a signal would end the process
            os.posix_fallocate(file, 0, num_bytes)
        return mmap.mmap(file, num_bytes)
    except OSError:
        if create:
            path.unlink()
        return None
    finally:
        os.close(file)


def _door(path: Path, size: int) -> socket.socket | None:
    """A socket at which ``size`` others can knock; None: the directory takes none."""
    door = socket.socket(socket.AF_UNIX)
    try:
        door.bind(str(path))
        door.listen(size)
    except OSError:
        door.close()
        return None
    return door


def _connected(
    door: socket.socket, doors: list[Path], group: ProcessGroup, timeout_s: float
) -> dict[int, socket.socket]:
    """A connection to each other rank: to the lower ones at their doors, to the others at this
    rank's.
    """
    me, peers = group.rank(), {}
    for rank in range(me):
        peers[rank] = socket.socket(socket.AF_UNIX)
        peers[rank].settimeout(timeout_s)
        peers[rank].connect(str(doors[rank]))
        peers[rank].sendall(me.to_bytes(4, "little"))
    with door:
        door.settimeout(timeout_s)
        for _ in range(me + 1, group.size()):
            peer, _ = door.accept()
            peer.settimeout(timeout_s)
            peers[int.from_bytes(peer.recv(4, socket.MSG_WAITALL), "little")] = peer
    return peers
