"""The section ``reward``."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from megatron_rl.config.section import Section


class RewardPart(Section):
    """One reward of several."""

    name: str
    """The verifier: a name of `megatron-rl list rewards`, or one of your own, ./my.py:my_reward."""
    label: str | None = None
    """Its name in metrics, reward/LABEL and eval/LABEL; null: the row's or function's."""
    weight: float = 1.0
    """Factor of its value in the sum."""
    settings: dict[str, Any] = {}
    """Settings of the verifier that differ from its defaults."""
    at_once: int = Field(16, ge=1)
    """Of an ``async def``: most answers that a rank has judged at a time."""
    deadline_s: float | None = Field(None, gt=0.0)
    """Longest wait for the verdict on an answer, seconds; later ones count as 0, and in the metric
    reward/late. null: 60 for an ``async def``; none for others, which bound their time by
    themselves."""


class RewardConfig(Section):
    """The verifier, or several."""

    name: str = "countdown"
    """The verifier: a name of `megatron-rl list rewards`, or one of your own, ./my.py:my_reward."""
    settings: dict[str, Any] = {}
    """Settings of the verifier that differ from its defaults."""
    at_once: int = Field(16, ge=1)
    """Of an ``async def``: most answers that a rank has judged at a time."""
    deadline_s: float | None = Field(None, gt=0.0)
    """Longest wait for the verdict on an answer, seconds; later ones count as 0, and in the metric
    reward/late. null: 60 for an ``async def``; none for others, which bound their time by
    themselves."""
    parts: tuple[RewardPart, ...] = ()
    """Several verifiers in place of name and the keys above; the reward is their weighted sum."""
    overlong_buffer: int = Field(0, ge=0)
    """Soft overlong punishment (arXiv 2503.14476, eq. 13): number of last tokens of max_new_tokens
    over which the reward falls; 0: off."""
    overlong_penalty: float = Field(1.0, gt=0.0)
    """Reward that an answer of rollout.max_new_tokens tokens loses by it."""
