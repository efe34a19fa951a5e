"""An advantage estimator: compares each answer with the best answer to its prompt."""

import torch


def best_of_group(rewards: torch.Tensor) -> torch.Tensor:
    """r - max of the answers to a prompt, centred: [P, G] -> [P, G]."""
    behind = rewards - rewards.max(dim=1, keepdim=True).values
    return behind - behind.mean(dim=1, keepdim=True)
