"""How fast a device multiplies matrices, measured."""

from __future__ import annotations

import time

import torch

from megatron_rl.device.select import Device

#: Rows of the square matrices: 3 ms a product at 100 GFLOP/s, 1 ms at 150 TFLOP/s.
_ROWS = {"cpu": 512, "cuda": 4096}


@torch.no_grad()
def matrix_peak(device: Device, dtype: torch.dtype) -> float:
    """FLOP/s of the best of four products of square matrices; on a CPU in fp32 with this rank's
    threads. Takes some 20 ms; less can be had if all ranks of a machine measure at once.
    """
    rows = _ROWS[device.kind]
    kind = torch.float32 if device.kind == "cpu" else dtype
    matrix = torch.ones(rows, rows, dtype=kind, device=device.torch_device)
    product = matrix @ matrix
    best = float("inf")
    for _ in range(4):
        start = _now(device)
        torch.mm(matrix, matrix, out=product)
        best = min(best, _now(device) - start)
    return 2.0 * rows**3 / best


def _now(device: Device) -> float:
    if device.kind == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()
