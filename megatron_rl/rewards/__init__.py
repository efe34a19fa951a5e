"""Verifiable rewards: ``VERIFIERS[name](record, completion) -> Reward``."""

from __future__ import annotations

from types import MappingProxyType
from typing import Mapping

from megatron_rl.catalogue import kinds
from megatron_rl.rewards.base import Reward, Verifier
from megatron_rl.rewards.code_record import check_code_record
from megatron_rl.rewards.countdown import check_countdown_record
from megatron_rl.rewards.math import check_math_record
from megatron_rl.rewards.sandbox import Limits, check_confinement, check_limits
from megatron_rl.rewards.topological_sort import check_topological_sort_record

#: Every verifier of this package by its ``reward.name``, with default settings.
VERIFIERS: Mapping[str, Verifier] = MappingProxyType(
    {row.name: row.load() for row in kinds.VERIFIERS.rows}
)


def check_sandbox() -> dict[str, str]:
    """What confines programs on this machine, as a fact for the run summary. Raises ``UserError``
    if this process lacks what the verifier code needs.
    """
    check_limits(Limits())
    return {"sandbox": check_confinement()}


__all__ = [
    "VERIFIERS",
    "Reward",
    "Verifier",
    "check_code_record",
    "check_countdown_record",
    "check_math_record",
    "check_sandbox",
    "check_topological_sort_record",
]
