"""The one place where the device is chosen: CPU with gloo, or CUDA with NCCL."""

from __future__ import annotations

import datetime
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist

from megatron_rl.config.schema import DeviceConfig
from megatron_rl.device import megatron_on_cpu
from megatron_rl.device.launch import Launch
from megatron_rl.device.quiet import silence
from megatron_rl.errors import UserError


@dataclass(frozen=True)
class Device:
    """What the ranks compute and talk with."""

    kind: Literal["cpu", "cuda"]
    torch_device: torch.device
    backend: Literal["gloo", "nccl"]


def select_device(config: DeviceConfig, launch: Launch) -> Device:
    """Choose the device, and on a CPU prepare torch and Megatron-Core for it. Call before Megatron
    is imported.

    Raises:
        UserError: CUDA is asked for and not there.
    """
    available = torch.cuda.is_available()
    if config.kind == "cuda" and not available:
        raise UserError(
            "device.kind is cuda, but torch sees no CUDA device; "
            "use device.kind cpu or install a CUDA build of torch"
        )
    if config.kind == "cuda" or (config.kind == "auto" and available):
        silence("cuda")
        torch.cuda.set_device(launch.local_rank)
        return Device("cuda", torch.device("cuda", launch.local_rank), "nccl")
    torch.set_num_threads(config.threads or launch.cores)
    silence("cpu")
    megatron_on_cpu.install()
    return Device("cpu", torch.device("cpu"), "gloo")


def connect(device: Device, launch: Launch, timeout_s: float) -> None:
    """Join the ranks of the launch; a single process started by hand becomes a world of one."""
    options = {"timeout": datetime.timedelta(seconds=timeout_s)}
    if not launch.launched:
        options |= {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    dist.init_process_group(device.backend, **options)
