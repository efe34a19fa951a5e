"""A rank that does nothing but reduce a number, with a heartbeat: run as a script in a process.

    python beating.py SILENCE_S FOLDER

It ends when FOLDER/end exists, touches FOLDER/alive (the first rank of a node), and prints
"steps N".
"""

import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_rl.config.schema import DeviceConfig
from megatron_rl.device.launch import read_launch
from megatron_rl.device.select import Device, joined


def main(silence_s: float, folder: Path) -> None:
    """Reduce until all ranks know of the end."""
    device = Device("cpu", torch.device("cpu"), "gloo")
    config = DeviceConfig(kind="cpu", silence_s=silence_s, heartbeat_file=folder / "alive")
    steps = 0
    with joined(device, read_launch(), config):
        asked = torch.zeros(1)
        while not asked.item():
            asked = torch.tensor([float((folder / "end").exists())])
            dist.all_reduce(asked)
            steps += 1
            time.sleep(0.02)
    print(f"steps {steps}")


if __name__ == "__main__":
    main(float(sys.argv[1]), Path(sys.argv[2]))
