"""What every loss reports: (sum, count) pairs that add over packs and ranks."""

from __future__ import annotations

import torch

from megatron_rl.algorithms.aggregate import Segments, SumAndCount, over_tokens
from megatron_rl.algorithms.interface import LossInputs
from megatron_rl.algorithms.kl import k3
from megatron_rl.algorithms.ratios import at_least_float32, exp_ratio, log_ratio


@torch.no_grad()
def loss_metrics(
    inputs: LossInputs, segments: Segments, clipped: SumAndCount
) -> dict[str, SumAndCount]:
    """clip_fraction (over tokens or sequences, as the loss clips), and over trained tokens: kl_old,
    ratio_mean.

    kl_old is the k3 estimate of KL(pi_old || pi_new) in nats; ratio_mean the mean of the raw w_t,
    without gamma~. With a router-shift weight also router/gamma_mean. All 0-d, detached, left on
    the device.
    """
    x = log_ratio(inputs)
    metrics = {
        "clip_fraction": (clipped[0].detach(), clipped[1]),
        "kl_old": over_tokens(k3(torch.zeros_like(x), x), segments),
        "ratio_mean": over_tokens(exp_ratio(x), segments),
    }
    if inputs.router_shift is not None:
        gamma = at_least_float32(inputs.router_shift)
        metrics["router/gamma_mean"] = over_tokens(gamma, segments)
    return metrics
