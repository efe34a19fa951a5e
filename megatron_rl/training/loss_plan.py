"""What goes into the loss of every pack of a mini-batch beside the pack itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from megatron_rl.algorithms.mismatch import MismatchSettings
from megatron_rl.algorithms.regularisers import Regularisers
from megatron_rl.config.algorithm import mismatch_high
from megatron_rl.config.schema import AlgorithmConfig


@dataclass(frozen=True)
class LossPlan:
    """Settings, and what is known of the whole mini-batch, over all packs and ranks."""

    settings: Any  #: of the loss
    regularisers: Regularisers
    mismatch: MismatchSettings | None  #: None: no sampler weights
    denominator_per_token: torch.Tensor | None  #: 0-d; None where no term is a mean over tokens
    gamma_mean: torch.Tensor | None  #: 0-d; None: gamma~ is not normalised


def regularisers(algorithm: AlgorithmConfig) -> Regularisers:
    """The KL penalty and the entropy bonus of the configuration."""
    return Regularisers(algorithm.kl_coef, algorithm.kl_estimator, algorithm.entropy_coef)


def mismatch_settings(algorithm: AlgorithmConfig) -> MismatchSettings | None:
    """The sampler weights of the configuration."""
    if algorithm.mismatch == "none":
        return None
    return MismatchSettings(algorithm.mismatch, algorithm.mismatch_low, mismatch_high(algorithm))
