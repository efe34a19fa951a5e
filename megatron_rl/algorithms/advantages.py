"""Advantages of P prompts with G completions each, from their rewards: [P, G] -> [P, G], detached.

A group whose rewards are all equal gets exactly 0 everywhere. std is the sample standard deviation
(divisor n - 1).
"""

from __future__ import annotations

import torch

#: Added to a standard deviation before dividing; rewards are of order 1.
STD_EPSILON = 1e-6


def _centred(rewards: torch.Tensor) -> torch.Tensor:
    """r - mean_G; exact zeros in groups of equal rewards, whose mean may be off by rounding."""
    if rewards.dim() != 2:
        raise ValueError(f"found rewards of shape {tuple(rewards.shape)}; expected [P, G]")
    rewards = rewards.detach()
    if not rewards.is_floating_point():
        rewards = rewards.float()
    same = (rewards == rewards[:, :1]).all(dim=1, keepdim=True)
    return torch.where(same, 0.0, rewards - rewards.mean(dim=1, keepdim=True))


def _sample_std(values: torch.Tensor, dim: tuple[int, ...]) -> torch.Tensor:
    """Standard deviation with divisor n - 1, of centred values; 0 (not NaN) for a single one."""
    size = 1
    for axis in dim:
        size *= values.shape[axis]
    return (values.square().sum(dim=dim, keepdim=True) / max(size - 1, 1)).sqrt()


def group_norm(rewards: torch.Tensor) -> torch.Tensor:
    """(r - mean_G) / (std_G + 1e-6): GRPO (arXiv 2402.03300), also GSPO, GMPO, RSPO."""
    centred = _centred(rewards)
    return centred / (_sample_std(centred, (1,)) + STD_EPSILON)


def group_mean(rewards: torch.Tensor) -> torch.Tensor:
    """r - mean_G, no division by the standard deviation: Dr. GRPO (arXiv 2503.20783)."""
    return _centred(rewards)


def rloo(rewards: torch.Tensor) -> torch.Tensor:
    """r_i - mean of the other G - 1 rewards = G / (G - 1) * (r_i - mean_G).

    RLOO, arXiv 2402.14740. Raises ValueError for G = 1, which has no others.
    """
    centred = _centred(rewards)
    size = rewards.shape[1]
    if size < 2:
        raise ValueError(
            "found one completion per prompt; rloo expects at least two; raise samples_per_prompt"
        )
    return centred * (size / (size - 1))


def reinforce_pp(rewards: torch.Tensor) -> torch.Tensor:
    """(r - mean_G) / (std_PG + 1e-6), std_PG over all P * G values of r - mean_G.

    REINFORCE++-baseline, arXiv 2501.03262. The group mean is the baseline and the whole batch gives
    the scale, so P must be all prompts of the step, over all ranks. The batch mean of r - mean_G is
    0 and not subtracted again. No KL term in the reward.
    """
    centred = _centred(rewards)
    return centred / (_sample_std(centred, (0, 1)) + STD_EPSILON)
