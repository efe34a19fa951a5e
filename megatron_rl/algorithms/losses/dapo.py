"""DAPO: the clipped token objective with a wider upper bound, mean over all tokens of the batch."""

from __future__ import annotations

from megatron_rl.algorithms.aggregate import over_tokens
from megatron_rl.algorithms.interface import LossInputs, LossOutputs
from megatron_rl.algorithms.losses.grpo import clipped_tokens
from megatron_rl.catalogue.losses import DapoSettings


def dapo(inputs: LossInputs, settings: DapoSettings) -> LossOutputs:
    """-1/(sum_i |y_i|) sum_i sum_t J_t (arXiv 2503.14476, eq. 8), J_t as in grpo. Denominator:
    tokens.

    DAPO's dynamic sampling and overlong shaping act on the batch and the reward, not here.
    """
    tokens = clipped_tokens(inputs, settings.clip_low, settings.clip_high)
    total, count = over_tokens(-tokens.objective, tokens.segments)
    return LossOutputs(total, count, tokens.metrics, tokens.clipped)
