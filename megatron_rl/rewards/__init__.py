"""Verifiable rewards: ``VERIFIERS[name](record, completion) -> Reward``."""

from __future__ import annotations

from types import MappingProxyType
from typing import Any, Callable, Mapping

from megatron_rl.rewards.base import Reward, Verifier
from megatron_rl.rewards.code import verify_code
from megatron_rl.rewards.code_record import check_code_record
from megatron_rl.rewards.countdown import check_countdown_record, verify_countdown
from megatron_rl.rewards.math import check_math_record, verify_math
from megatron_rl.rewards.sandbox import Limits, check_confinement, check_limits

#: Every verifier, by the name ``reward.name`` gives it.
VERIFIERS: Mapping[str, Verifier] = MappingProxyType(
    {
        "countdown": verify_countdown,  # numbers, target
        "math": verify_math,  # answer
        "code": verify_code,  # tests, entry_point
    }
)

#: What a verifier needs of a record, by the same names: ``UserError`` where a record lacks it, so
#: that a run can look at every line before it starts. Cheap: no process, no completion.
RECORD_CHECKS: Mapping[str, Callable[[Mapping[str, Any]], None]] = MappingProxyType(
    {
        "countdown": check_countdown_record,
        "math": check_math_record,
        "code": check_code_record,
    }
)


def _check_code_machine() -> None:
    check_limits(Limits())
    check_confinement()


#: What some verifiers need of the machine: ``UserError`` where this process lacks it.
MACHINE_CHECKS: Mapping[str, Callable[[], None]] = MappingProxyType({"code": _check_code_machine})

__all__ = ["MACHINE_CHECKS", "RECORD_CHECKS", "VERIFIERS", "Reward", "Verifier"]
