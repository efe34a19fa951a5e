"""Imports for a user's own loss, reward, advantage estimator, sampler correction, rollout engine,
environment, data source, optimizer, logger or Hugging Face family.

No torch. ``LossInputs``, ``LossOutputs`` and ``SamplerWeights`` are in ``megatron_rl.algorithms``,
``EngineParts`` and ``WholeAnswers`` in ``megatron_rl.rollout.engine``.
"""

from megatron_rl.catalogue.declare import (
    advantages,
    correction,
    engine,
    environment,
    logger,
    loss,
    optimizer,
    source,
    verifier,
)
from megatron_rl.catalogue.settings import Settings
from megatron_rl.errors import UserError
from megatron_rl.families.common.family import Family, Rule
from megatron_rl.rewards.base import Reward, require

__all__ = [
    "Family",
    "Reward",
    "Rule",
    "Settings",
    "UserError",
    "advantages",
    "correction",
    "engine",
    "environment",
    "logger",
    "loss",
    "optimizer",
    "require",
    "source",
    "verifier",
]
