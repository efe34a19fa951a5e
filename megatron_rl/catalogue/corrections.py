"""The sampler corrections with their settings: weights against the mismatch of sampler and trainer,
rho = pi_old / mu. To ship one: a row here, and its function in ``algorithms/mismatch.py``.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from megatron_rl.catalogue.entry import CorrectionEntry
from megatron_rl.catalogue.settings import Positive, Settings


class CapSettings(Settings):
    """The cap on rho."""

    high: Positive = 2.0
    """The cap C on rho, a ratio; algorithm.mismatch_high sets it too."""


class IcepopSettings(Settings):
    """The range of rho."""

    low: float = Field(0.5, ge=0.0)
    """Lowest rho that is kept, a ratio; algorithm.mismatch_low sets it too."""
    high: Positive = 5.0
    """Highest rho that is kept, a ratio; algorithm.mismatch_high sets it too."""

    @model_validator(mode="after")
    def bounds_are_in_order(self) -> IcepopSettings:
        """The lower bound is below the upper one."""
        if self.low >= self.high:
            raise ValueError(
                f"low {self.low:g} (algorithm.mismatch_low) is not below high {self.high:g} "
                "(algorithm.mismatch_high); expected less; change one of them"
            )
        return self


class KpopSettings(Settings):
    """The bound on both divergences. The authors take 0.1 to 0.2."""

    phi: Positive = 0.1
    """Largest KL of a token against all others, in either direction, nats."""
    weigh: bool = True
    """Whether a token that is kept has the weight rho, or 1."""

    @property
    def only_masks(self) -> bool:
        """Whether all weights are 0 or 1."""
        return not self.weigh


class OffPolicyMaskSettings(Settings):
    """Which answers are left out. The paper names no delta; 0.05 to 0.2 is usual."""

    delta: Positive = 0.1
    """Largest mean over an answer's tokens of log(q / p), nats, where its advantage is below 0."""
    anchor: Literal["sampler", "old"] = "sampler"
    """The policy q; sampler: drift and mismatch both count; old: drift since scoring alone."""
    cap: Positive | None = None
    """Answers that are kept have the weights min(rho, cap) of tis; null: 1."""

    @property
    def only_masks(self) -> bool:
        """Whether all weights are 0 or 1."""
        return self.cap is None


_CODE = "megatron_rl.algorithms.mismatch"

CORRECTIONS: tuple[CorrectionEntry, ...] = (
    CorrectionEntry(
        name="tis",
        summary="truncated importance sampling: min(rho, C)",
        code=f"{_CODE}:tis",
        settings=CapSettings,
    ),
    CorrectionEntry(
        name="mis_token",
        summary="masked importance sampling by token: rho where rho <= C, else 0",
        code=f"{_CODE}:mis_token",
        settings=CapSettings,
    ),
    CorrectionEntry(
        name="mis_sequence",
        summary="masked importance sampling by answer: the product of rho where it is <= C, else 0",
        code=f"{_CODE}:mis_sequence",
        settings=CapSettings,
    ),
    CorrectionEntry(
        name="icepop",
        summary="rho where low <= rho <= high, else 0",
        code=f"{_CODE}:icepop",
        settings=IcepopSettings,
        paper="arXiv 2510.18855",
    ),
    CorrectionEntry(
        name="kpop",
        summary="rho where the token's KL is <= phi in both directions, else 0",
        code=f"{_CODE}:kpop",
        settings=KpopSettings,
        paper="ringtech.notion.site/kpop; arXiv 2606.15079",
    ),
    CorrectionEntry(
        name="off_policy_mask",
        summary="leaves out answers with A < 0 that the policy has moved away from",
        code=f"{_CODE}:off_policy_mask",
        settings=OffPolicyMaskSettings,
        paper="arXiv 2512.02556, eq. 9",
    ),
)
