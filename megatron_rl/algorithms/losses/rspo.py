"""RSPO: GMPO on ratios scaled down where the routers have moved."""

from __future__ import annotations

from megatron_rl.algorithms.interface import LossInputs, LossOutputs
from megatron_rl.algorithms.losses.gmpo import geometric_mean_loss
from megatron_rl.algorithms.ratios import log_ratio, log_shift
from megatron_rl.catalogue.losses import GmpoSettings


def rspo(inputs: LossInputs, settings: GmpoSettings) -> LossOutputs:
    """``geometric_mean_loss`` of x_t = log w_t + log gamma~_t: shifted BEFORE the clip.

    arXiv 2510.23027 v2, eq. 11. Raises ValueError without ``inputs.router_shift``.
    """
    return geometric_mean_loss(inputs, settings, log_ratio(inputs) + log_shift(inputs))
