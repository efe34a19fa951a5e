"""RSPO as first published: the clipped token ratio is scaled, not the ratio that is clipped."""

from __future__ import annotations

from megatron_rl.algorithms.interface import LossInputs, LossOutputs
from megatron_rl.algorithms.losses.gmpo import geometric_mean_loss
from megatron_rl.algorithms.ratios import log_ratio, log_shift
from megatron_rl.catalogue.losses import GmpoSettings


def rspo_v1(inputs: LossInputs, settings: GmpoSettings) -> LossOutputs:
    """``geometric_mean_loss`` of x_t = log w_t, with log gamma~_t added AFTER the clip.

    arXiv 2510.23027 v1, for either sign of A: gamma~ scales the sequence's objective and leaves the
    trust region where it was. Raises ValueError without ``inputs.router_shift``.
    """
    return geometric_mean_loss(inputs, settings, log_ratio(inputs), log_shift(inputs))
