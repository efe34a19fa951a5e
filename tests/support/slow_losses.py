"""Reference losses: one token after the other, one sequence after the other, straight from the
equations.

Everything is a Python float or a 0-d float64 tensor; gradients come from autograd through the
loops. Nothing is imported from the package, so that it can judge the package.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch

Settings = Mapping[str, float]


def slow_loss(
    name: str,
    logprobs: torch.Tensor,
    old_logprobs: list[float],
    advantages: list[float],
    mask: list[bool],
    sequence_ids: list[int],
    settings: Settings,
    router_shift: list[float] | None = None,
) -> tuple[torch.Tensor, int]:
    """(loss_sum, denominator) of a batch; logprobs float64 [T] with requires_grad."""
    gammas = [1.0] * len(mask) if router_shift is None else router_shift
    total = torch.zeros((), dtype=torch.float64)
    num_sequences, num_tokens = 0, 0
    for sequence in sorted(set(sequence_ids)):
        places = [t for t in range(len(mask)) if mask[t] and sequence_ids[t] == sequence]
        if not places:
            continue
        tokens = [(logprobs[t], old_logprobs[t], gammas[t]) for t in places]
        total = total - OBJECTIVES[name](tokens, advantages[places[0]], settings)
        num_sequences += 1
        num_tokens += len(places)
    return total, num_tokens if name in TOKEN_MEAN else num_sequences


def _clipped_terms(tokens: list, advantage: float, settings: Settings) -> list[torch.Tensor]:
    """min(w~ A, clip(w~) A) of each token."""
    terms = []
    for new, old, gamma in tokens:
        ratio = torch.exp(new - old) * gamma
        lowest, highest = 1 - settings["clip_low"], 1 + settings["clip_high"]
        clipped = torch.tensor(lowest, dtype=torch.float64) if ratio < lowest else ratio
        clipped = torch.tensor(highest, dtype=torch.float64) if ratio > highest else clipped
        first, second = ratio * advantage, clipped * advantage
        terms.append(min(first, second))
    return terms


def _grpo(tokens: list, advantage: float, settings: Settings) -> torch.Tensor:
    return sum(_clipped_terms(tokens, advantage, settings)) / len(tokens)


def _dr_grpo(tokens: list, advantage: float, settings: Settings) -> torch.Tensor:
    return sum(_clipped_terms(tokens, advantage, settings)) / settings["length_divisor"]


def _dapo(tokens: list, advantage: float, settings: Settings) -> torch.Tensor:
    return sum(_clipped_terms(tokens, advantage, settings))


def _gspo(tokens: list, advantage: float, settings: Settings) -> torch.Tensor:
    product = torch.ones((), dtype=torch.float64)
    for new, old, gamma in tokens:
        product = product * torch.exp(new - old) * gamma
    ratio = product ** (1 / len(tokens))
    clipped = min(max(ratio.item(), 1 - settings["clip_low"]), 1 + settings["clip_high"])
    if clipped * advantage < ratio.item() * advantage:
        return torch.tensor(clipped * advantage, dtype=torch.float64)
    return ratio * advantage


def _geometric(
    tokens: list, advantage: float, settings: Settings, gamma_before_clip: bool
) -> torch.Tensor:
    """A times the geometric mean of the tokens' clipped ratios, as a product, not in log space."""
    lowest, highest = math.exp(-settings["clip_low"]), math.exp(settings["clip_high"])
    product = torch.ones((), dtype=torch.float64)
    for new, old, gamma in tokens:
        ratio = torch.exp(new - old) * (gamma if gamma_before_clip else 1.0)
        if advantage > 0 and ratio > highest:
            ratio = torch.tensor(highest, dtype=torch.float64)
        if advantage < 0 and ratio < lowest:
            ratio = torch.tensor(lowest, dtype=torch.float64)
        product = product * ratio * (1.0 if gamma_before_clip else gamma)
    return advantage * product ** (1 / len(tokens))


def _gmpo(tokens: list, advantage: float, settings: Settings) -> torch.Tensor:
    return _geometric(tokens, advantage, settings, gamma_before_clip=True)


def _rspo_v1(tokens: list, advantage: float, settings: Settings) -> torch.Tensor:
    return _geometric(tokens, advantage, settings, gamma_before_clip=False)


def _cispo(tokens: list, advantage: float, settings: Settings) -> torch.Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for new, old, gamma in tokens:
        ratio = math.exp(new.item() - old) * gamma
        weight = min(max(ratio, 1 - settings["clip_low"]), 1 + settings["clip_high"])
        total = total + weight * advantage * new
    return total


def _sapo(tokens: list, advantage: float, settings: Settings) -> torch.Tensor:
    tau = settings["tau_positive"] if advantage > 0 else settings["tau_negative"]
    total = torch.zeros((), dtype=torch.float64)
    for new, old, gamma in tokens:
        ratio = torch.exp(new - old) * gamma
        total = total + 4 / tau / (1 + torch.exp(-tau * (ratio - 1))) * advantage
    return total / len(tokens)


OBJECTIVES: dict[str, Callable[[list, float, Settings], torch.Tensor]] = {
    "grpo": _grpo,
    "dr_grpo": _dr_grpo,
    "dapo": _dapo,
    "gspo": _gspo,
    "gmpo": _gmpo,
    "cispo": _cispo,
    "sapo": _sapo,
    "rspo": _gmpo,
    "rspo_v1": _rspo_v1,
}
TOKEN_MEAN = ("dapo", "cispo")
