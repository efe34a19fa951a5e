"""The one place where the device is chosen: CPU with gloo, or CUDA with NCCL."""

from __future__ import annotations

import contextlib
import datetime
import os
from dataclasses import dataclass
from typing import Any, Iterator, Literal

import torch
import torch.distributed as dist

from megatron_rl.config.schema import DeviceConfig
from megatron_rl.device import megatron_on_cpu
from megatron_rl.device.allocator import keep_freed_memory
from megatron_rl.device.heartbeat import Heartbeat
from megatron_rl.device.launch import Launch
from megatron_rl.device.quiet import silence
from megatron_rl.errors import UserError


@dataclass(frozen=True)
class Device:
    """The device of this rank and the backend of its collectives."""

    kind: Literal["cpu", "cuda"]
    torch_device: torch.device
    backend: Literal["gloo", "nccl"]


def select_device(config: DeviceConfig, launch: Launch) -> Device:
    """Choose the device; on a CPU prepare torch and Megatron-Core for it. Call before Megatron is
    imported.

    Raises:
        UserError: CUDA is asked for and missing, or this machine has more ranks than GPUs.
    """
    available = torch.cuda.is_available()
    if config.kind == "cuda" and not available:
        raise UserError(
            "device.kind is cuda, but torch sees no CUDA device; "
            "use device.kind cpu or install a CUDA build of torch"
        )
    if config.kind == "cuda" or (config.kind == "auto" and available):
        silence("cuda")
        if launch.local_rank >= (found := torch.cuda.device_count()):
            raise UserError(
                f"LOCAL_RANK is {launch.local_rank} on a machine where torch sees {found} GPUs; "
                "expected a GPU for each rank; start fewer ranks (torchrun.sh: RANKS_PER_NODE), or "
                "look at CUDA_VISIBLE_DEVICES"
            )
        torch.cuda.set_device(launch.local_rank)
        return Device("cuda", torch.device("cuda", launch.local_rank), "nccl")
    torch.set_num_threads(config.threads or launch.cores)
    keep_freed_memory()
    silence("cpu")
    megatron_on_cpu.install()
    return Device("cpu", torch.device("cpu"), "gloo")


def connect(device: Device, launch: Launch, timeout_s: float) -> None:
    """Join the ranks of the launch; a single process started by hand becomes a world of one.

    Raises:
        UserError: ranks were started without a rendezvous address.
    """
    options: dict[str, Any] = {"timeout": datetime.timedelta(seconds=timeout_s)}
    if not launch.launched:
        options |= {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    elif launch.master is None:
        raise UserError(
            "RANK is set and MASTER_ADDR and MASTER_PORT are not; expected the address of rank 0 "
            "and a port that is free there; start several ranks with torchrun, or unset RANK, "
            "WORLD_SIZE and LOCAL_RANK"
        )
    else:  # torch reads the address there, without brackets
        os.environ["MASTER_ADDR"] = launch.master[0]
    dist.init_process_group(device.backend, **options)


@contextlib.contextmanager
def joined(device: Device, launch: Launch, config: DeviceConfig) -> Iterator[None]:
    """Join the ranks and give signs of life; leave the process group at the end.

    Raises:
        UserError: as `connect` and `Heartbeat`.
    """
    with Heartbeat(launch, config.silence_s, config.timeout_s, config.heartbeat_file):
        connect(device, launch, config.timeout_s)
        try:
            yield
        finally:
            dist.destroy_process_group()
