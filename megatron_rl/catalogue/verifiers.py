"""The verifiers, with their settings. To ship one: a row here, and its file in ``rewards/``."""

from __future__ import annotations

from pydantic import Field

from megatron_rl.catalogue.entry import VerifierEntry
from megatron_rl.catalogue.settings import Settings


class CountdownSettings(Settings):
    """Settings of the verifier countdown."""

    well_formed: float = Field(0.1, ge=0.0, le=1.0)
    """Reward of a well-formed expression that is wrong; a right one has 1."""


class TopologicalSortSettings(Settings):
    """Settings of the verifier topological_sort."""

    well_formed: float = Field(0.1, ge=0.0, le=1.0)
    """Reward of an order of all items that breaks a pair; a right one has 1."""


VERIFIERS: tuple[VerifierEntry, ...] = (
    VerifierEntry(
        name="countdown",
        summary="an expression of the record's numbers, each used once, that gives the target",
        code="megatron_rl.rewards.countdown:verify_countdown",
        settings=CountdownSettings,
        needs=("numbers", "target"),
        check="megatron_rl.rewards:check_countdown_record",
    ),
    VerifierEntry(
        name="math",
        summary="the final answer equals the record's, as mathematics",
        code="megatron_rl.rewards.math:verify_math",
        needs=("answer",),
        check="megatron_rl.rewards:check_math_record",
    ),
    VerifierEntry(
        name="code",
        summary="a Python program that passes the record's tests in a sandbox",
        code="megatron_rl.rewards.code:verify_code",
        check="megatron_rl.rewards:check_code_record",
        machine_check="megatron_rl.rewards:check_sandbox",
    ),
    VerifierEntry(
        name="topological_sort",
        summary="the record's items in an order that keeps each of its pairs (x before y)",
        code="megatron_rl.rewards.topological_sort:verify_topological_sort",
        settings=TopologicalSortSettings,
        needs=("items", "before"),
        check="megatron_rl.rewards:check_topological_sort_record",
    ),
)
