"""Free memory of a rank, and its share for copies of experts."""

from __future__ import annotations

import psutil
import torch

from megatron_rl.device.launch import Launch, read_launch
from megatron_rl.device.select import Device

#: Share of the free memory that copies of experts may take.
SPARE = 0.25


def available_bytes(device: Device, launch: Launch, *, host: bool) -> int:
    """Free memory of this rank's device. For the host, and on a CPU, this rank's share of the
    machine's free memory.
    """
    if device.kind == "cuda" and not host:
        return torch.cuda.mem_get_info(device.torch_device)[0]
    return _host_bytes(launch)


def spare_bytes() -> float:
    """Bytes of host memory that this rank can spare for copies of experts."""
    return SPARE * _host_bytes(read_launch())


def _host_bytes(launch: Launch) -> int:
    """This rank's share of the machine's free memory."""
    return psutil.virtual_memory().available // launch.local_world_size
