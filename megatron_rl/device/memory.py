"""Free memory of a rank."""

from __future__ import annotations

import psutil
import torch

from megatron_rl.device.launch import Launch
from megatron_rl.device.select import Device


def available_bytes(device: Device, launch: Launch, *, host: bool) -> int:
    """Free memory of this rank's device. For the host, and on a CPU, this rank's share of the
    machine's free memory.
    """
    if device.kind == "cuda" and not host:
        return torch.cuda.mem_get_info(device.torch_device)[0]
    return psutil.virtual_memory().available // launch.local_world_size
