"""Dr. GRPO: the clipped token objective, summed over a sequence, over a constant length."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_rl.algorithms.aggregate import over_constant_length
from megatron_rl.algorithms.interface import LossInputs, LossOutputs
from megatron_rl.algorithms.losses.grpo import clipped_tokens
from megatron_rl.algorithms.settings import Settings, require_positive


@dataclass(frozen=True)
class DrGrpoSettings(Settings):
    """Clip range as in grpo; ``length_divisor``, tokens: meant to be the longest answer allowed."""

    clip_low: float = 0.2
    clip_high: float = 0.2
    length_divisor: float = 3000.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive("length_divisor", self.length_divisor, finite=True)


def dr_grpo(inputs: LossInputs, settings: DrGrpoSettings) -> LossOutputs:
    """-1/S sum_i 1/length_divisor sum_t J_t (arXiv 2503.20783, fig. 1), J_t as in grpo.
    Denominator: sequences.

    Long answers weigh more than short ones, as the policy gradient has it. Goes with the advantages
    ``group_mean``.
    """
    tokens = clipped_tokens(inputs, settings.clip_low, settings.clip_high)
    total, count = over_constant_length(-tokens.objective, tokens.segments, settings.length_divisor)
    return LossOutputs(total, count, tokens.metrics, tokens.clipped)
