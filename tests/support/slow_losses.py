"""Reference losses: one token after the other, one sequence after the other, straight from the
equations.

Everything is a Python float or a 0-d float64 tensor; gradients come from autograd through the
loops. Nothing is imported from the package, so that it can judge the package.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch

Settings = Mapping[str, float]


class Token(NamedTuple):
    """A trained token: log-probabilities, and what router shift and the sampler make of it."""

    new: torch.Tensor
    old: float
    gamma: float  #: factor of the ratio
    width: float  #: factor of the clip range
    weight: float  #: in a geometric mean
    sampler: float  #: factor of the term
    mu: float  #: log-probability of the sampler


def token(
    new: torch.Tensor,
    old: float,
    advantage: float,
    gamma: float,
    mode: str,
    sampler: float,
    mu: float,
) -> Token:
    """gamma where the mode wants it, 1 in the other places."""
    if mode == "ratio" or (mode == "negative_only" and advantage < 0):
        return Token(new, old, gamma, 1.0, 1.0, sampler, mu)
    if mode == "range":
        return Token(new, old, 1.0, gamma, 1.0, sampler, mu)
    if mode == "token_weight":
        return Token(new, old, 1.0, 1.0, gamma, sampler, mu)
    return Token(new, old, 1.0, 1.0, 1.0, sampler, mu)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def slow_loss(
    name: str,
    logprobs: torch.Tensor,
    old_logprobs: list[float],
    advantages: list[float],
    mask: list[bool],
    sequence_ids: list[int],
    settings: Settings,
    router_shift: list[float] | None = None,
    shift_mode: str = "ratio",
    sampler_weights: list[float] | None = None,
    rollout_logprobs: list[float] | None = None,
) -> tuple[torch.Tensor, int]:
    """(loss_sum, denominator) of a batch; logprobs float64 [T] with requires_grad."""
    gammas = [1.0] * len(mask) if router_shift is None else router_shift
    weights = [1.0] * len(mask) if sampler_weights is None else sampler_weights
    mu = old_logprobs if rollout_logprobs is None else rollout_logprobs
    total = torch.zeros((), dtype=torch.float64)
    num_sequences, num_tokens = 0, 0
    for sequence in sorted(set(sequence_ids)):
        places = [t for t in range(len(mask)) if mask[t] and sequence_ids[t] == sequence]
        if not places:
            continue
        advantage = advantages[places[0]]
        tokens = [
            token(logprobs[t], old_logprobs[t], advantage, gammas[t], shift_mode, weights[t], mu[t])
            for t in places
        ]
        total = total - OBJECTIVES[name](tokens, advantage, settings)
        num_sequences += 1
        num_tokens += len(places)
    return total, num_tokens if name in TOKEN_MEAN else num_sequences


def _clipped_terms(tokens: list[Token], advantage: float, settings: Settings) -> list[torch.Tensor]:
    """min(w~ A, clip(w~) A) of each token, times its sampler weight."""
    terms = []
    for t in tokens:
        ratio = torch.exp(t.new - t.old) * t.gamma
        lowest, highest = 1 - settings["clip_low"] * t.width, 1 + settings["clip_high"] * t.width
        clipped = torch.tensor(lowest, dtype=torch.float64) if ratio < lowest else ratio
        clipped = torch.tensor(highest, dtype=torch.float64) if ratio > highest else clipped
        first, second = ratio * advantage, clipped * advantage
        terms.append(min(first, second) * t.sampler)
    return terms


def _grpo(tokens: list[Token], advantage: float, settings: Settings) -> torch.Tensor:
    return sum(_clipped_terms(tokens, advantage, settings)) / len(tokens)


def _dr_grpo(tokens: list[Token], advantage: float, settings: Settings) -> torch.Tensor:
    return sum(_clipped_terms(tokens, advantage, settings)) / settings["length_divisor"]


def _dapo(tokens: list[Token], advantage: float, settings: Settings) -> torch.Tensor:
    return sum(_clipped_terms(tokens, advantage, settings))


def _gspo(tokens: list[Token], advantage: float, settings: Settings) -> torch.Tensor:
    product = torch.ones((), dtype=torch.float64)
    for t in tokens:
        product = product * (torch.exp(t.new - t.old) * t.gamma) ** t.weight
    ratio = product ** (1 / sum(t.weight for t in tokens))
    width, sampler = _mean([t.width for t in tokens]), _mean([t.sampler for t in tokens])
    lowest, highest = 1 - settings["clip_low"] * width, 1 + settings["clip_high"] * width
    clipped = min(max(ratio.item(), lowest), highest)
    if clipped * advantage < ratio.item() * advantage:
        return torch.tensor(clipped * advantage * sampler, dtype=torch.float64)
    return ratio * advantage * sampler


def _geometric(
    tokens: list[Token], advantage: float, settings: Settings, gamma_before_clip: bool
) -> torch.Tensor:
    """A times the geometric mean of the tokens' clipped ratios, as a product, not in log space."""
    product = torch.ones((), dtype=torch.float64)
    for t in tokens:
        lowest = math.exp(-settings["clip_low"] * t.width)
        highest = math.exp(settings["clip_high"] * t.width)
        ratio = torch.exp(t.new - t.old) * (t.gamma if gamma_before_clip else 1.0)
        if advantage > 0 and ratio > highest:
            ratio = torch.tensor(highest, dtype=torch.float64)
        if advantage < 0 and ratio < lowest:
            ratio = torch.tensor(lowest, dtype=torch.float64)
        product = product * (ratio * (1.0 if gamma_before_clip else t.gamma)) ** t.weight
    mean = product ** (1 / sum(t.weight for t in tokens))
    return advantage * mean * _mean([t.sampler for t in tokens])


def _gmpo(tokens: list[Token], advantage: float, settings: Settings) -> torch.Tensor:
    return _geometric(tokens, advantage, settings, gamma_before_clip=True)


def _rspo_v1(tokens: list[Token], advantage: float, settings: Settings) -> torch.Tensor:
    return _geometric(tokens, advantage, settings, gamma_before_clip=False)


def _cispo(tokens: list[Token], advantage: float, settings: Settings) -> torch.Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for t in tokens:
        ratio = math.exp(t.new.item() - t.old) * t.gamma
        lowest, highest = 1 - settings["clip_low"] * t.width, 1 + settings["clip_high"] * t.width
        total = total + min(max(ratio, lowest), highest) * advantage * t.new * t.sampler
    return total


def _sapo(tokens: list[Token], advantage: float, settings: Settings) -> torch.Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for t in tokens:
        tau = settings["tau_positive"] if advantage > 0 else settings["tau_negative"]
        tau = tau / t.width
        ratio = torch.exp(t.new - t.old) * t.gamma
        gate = 4 / tau / (1 + torch.exp(-tau * (ratio - 1)))
        total = total + gate * advantage * t.sampler
    return total / len(tokens)


def bernoulli_kl(a: float, b: float) -> float:
    """KL of a coin that falls a of the time from one that falls b of the time; b above 1 is 1."""
    b = min(b, 1.0)
    if a < 1 and b == 1:
        return math.inf
    kl = a * math.log(a / b)
    return kl if a == 1 else kl + (1 - a) * math.log((1 - a) / (1 - b))


def _anchor(t: Token, settings: Settings) -> float:
    return t.mu if settings["anchor"] == "sampler" else t.old


def _dppo(tokens: list[Token], advantage: float, settings: Settings, kind: str) -> torch.Tensor:
    """Without the tokens that have moved too far where their advantage wants them."""
    total = torch.zeros((), dtype=torch.float64)
    for t in tokens:
        q = math.exp(_anchor(t, settings))
        ratio = math.exp(t.new.item()) * t.gamma / q
        moved = q * ratio - q
        if kind == "kl":
            moved = math.copysign(bernoulli_kl(q, q * ratio), moved)
        if advantage > 0 and moved > settings["divergence_high"] * t.width:
            continue
        if advantage <= 0 and moved < -settings["divergence_low"] * t.width:
            continue
        total = total + min(ratio, settings["ratio_cap"]) * advantage * t.new * t.sampler
    return total


def _dppo_tv(tokens: list[Token], advantage: float, settings: Settings) -> torch.Tensor:
    return _dppo(tokens, advantage, settings, "tv")


def _dppo_kl(tokens: list[Token], advantage: float, settings: Settings) -> torch.Tensor:
    return _dppo(tokens, advantage, settings, "kl")


def _drpo(tokens: list[Token], advantage: float, settings: Settings) -> torch.Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for t in tokens:
        q = math.exp(_anchor(t, settings))
        ratio = torch.exp(t.new) * t.gamma / q
        penalty = abs(advantage) * q * (ratio - 1) ** 2 / (2 * settings["delta"] * t.width)
        total = total + (advantage * ratio - penalty) * t.sampler
    return total


def slow_regularisers(
    logprobs: torch.Tensor,
    ref_logprobs: list[float],
    entropy: torch.Tensor,
    mask: list[bool],
    estimator: str,
    kl_coef: float,
    entropy_coef: float,
    distance: torch.Tensor,
    shift_coef: float,
) -> torch.Tensor:
    """kl_coef * mean KL estimate - entropy_coef * mean entropy + shift_coef * mean distance, over
    the trained tokens.
    """
    places = [t for t in range(len(mask)) if mask[t]]
    total = torch.zeros((), dtype=torch.float64)
    for t in places:
        log_r = ref_logprobs[t] - logprobs[t]
        kl = {
            "k1": -log_r,
            "k2": log_r * log_r / 2,
            "k3": torch.exp(log_r) - 1 - log_r,
        }[estimator]
        total = total + kl_coef * kl - entropy_coef * entropy[t] + shift_coef * distance[t]
    return total / max(len(places), 1)


OBJECTIVES: dict[str, Callable[[list[Token], float, Settings], torch.Tensor]] = {
    "grpo": _grpo,
    "dr_grpo": _dr_grpo,
    "dapo": _dapo,
    "gspo": _gspo,
    "gmpo": _gmpo,
    "cispo": _cispo,
    "sapo": _sapo,
    "dppo_tv": _dppo_tv,
    "dppo_kl": _dppo_kl,
    "drpo": _drpo,
    "rspo": _gmpo,
    "rspo_v1": _rspo_v1,
}
TOKEN_MEAN = ("dapo", "cispo", "dppo_tv", "dppo_kl", "drpo")
