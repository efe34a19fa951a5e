"""Dr. GRPO: the clipped token objective, summed over a sequence, over a constant length."""

from __future__ import annotations

from megatron_rl.algorithms.aggregate import over_constant_length
from megatron_rl.algorithms.interface import LossInputs, LossOutputs
from megatron_rl.algorithms.losses.grpo import clipped_tokens
from megatron_rl.catalogue.losses import DrGrpoSettings


def dr_grpo(inputs: LossInputs, settings: DrGrpoSettings) -> LossOutputs:
    """-1/S sum_i 1/length_divisor sum_t J_t (arXiv 2503.20783, fig. 1), J_t as in grpo.
    Denominator: sequences.

    Long answers weigh more than short ones, as the policy gradient has it. Goes with the advantages
    ``group_mean``.
    """
    tokens = clipped_tokens(inputs, settings.clip_low, settings.clip_high)
    total, count = over_constant_length(-tokens.objective, tokens.segments, settings.length_divisor)
    return LossOutputs(total, count, tokens.metrics, tokens.clipped)
