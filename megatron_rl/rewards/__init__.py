"""Verifiable rewards: ``VERIFIERS[name](record, completion) -> Reward``."""

from __future__ import annotations

from types import MappingProxyType
from typing import Mapping

from megatron_rl.rewards.base import Reward, Verifier
from megatron_rl.rewards.code import verify_code
from megatron_rl.rewards.countdown import verify_countdown
from megatron_rl.rewards.math import verify_math

#: Every verifier, by the name ``reward.name`` gives it.
VERIFIERS: Mapping[str, Verifier] = MappingProxyType(
    {
        "countdown": verify_countdown,  # numbers, target
        "math": verify_math,  # answer
        "code": verify_code,  # tests, entry_point
    }
)

__all__ = ["VERIFIERS", "Reward", "Verifier"]
