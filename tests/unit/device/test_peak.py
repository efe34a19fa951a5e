"""The measured speed of matrix products."""

import torch

from megatron_rl.device import peak
from megatron_rl.device.select import Device

CPU = Device("cpu", torch.device("cpu"), "gloo")


def test_it_is_the_operations_over_the_shortest_time(monkeypatch):
    """2 * 512^3 operations; the products seem to take 4, 2, 8 and 5 s, the clock's reading none."""
    times = iter([0.0, 4.0, 10.0, 12.0, 20.0, 28.0, 30.0, 35.0])
    monkeypatch.setattr(peak, "_now", lambda device: next(times))
    assert peak.matrix_peak(CPU, torch.bfloat16) == 2 * 512**3 / 2.0


def test_products_on_a_cpu_are_in_fp32(monkeypatch):
    kinds = []
    original = torch.mm

    def watched(a, b, **kwargs):
        kinds.append(a.dtype)
        return original(a, b, **kwargs)

    monkeypatch.setattr(torch, "mm", watched)
    peak.matrix_peak(CPU, torch.bfloat16)
    assert kinds == [torch.float32] * 4
