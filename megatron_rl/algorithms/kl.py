"""Per-token estimates of KL(p || q) from tokens sampled from p.

J. Schulman, "Approximating KL divergence", 2020. log r = log q(y_t) - log p(y_t), nats; all shapes
[T]. Each is 0 where the two agree.
"""

from __future__ import annotations

import torch

from megatron_rl.algorithms.ratios import exp_ratio


def k1(p_logprobs: torch.Tensor, q_logprobs: torch.Tensor) -> torch.Tensor:
    """-log r: unbiased, high variance, may be negative."""
    return p_logprobs - q_logprobs


def k2(p_logprobs: torch.Tensor, q_logprobs: torch.Tensor) -> torch.Tensor:
    """(log r)^2 / 2: biased, low variance, never negative."""
    return 0.5 * (q_logprobs - p_logprobs) ** 2


def k3(p_logprobs: torch.Tensor, q_logprobs: torch.Tensor) -> torch.Tensor:
    """r - 1 - log r: unbiased, low variance, never negative. r is held constant above exp(60)."""
    log_r = q_logprobs - p_logprobs
    return exp_ratio(log_r) - 1 - log_r
