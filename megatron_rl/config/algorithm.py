"""What follows from the section ``algorithm``."""

from __future__ import annotations

from megatron_rl.config.names import ROUTER_SHIFT_LOSSES
from megatron_rl.config.schema import AlgorithmConfig


def uses_router_shift(algorithm: AlgorithmConfig) -> bool:
    """Router shift: as configured, else as the loss asks."""
    if algorithm.router_shift.enabled is not None:
        return algorithm.router_shift.enabled
    return algorithm.name in ROUTER_SHIFT_LOSSES


def keeps_trace(algorithm: AlgorithmConfig) -> bool:
    """Whether the scoring pass records the routers: for their shift, or to replay them."""
    return uses_router_shift(algorithm) or algorithm.routing_replay != "none"


def updates_per_step(algorithm: AlgorithmConfig) -> int:
    """Optimizer steps on a rollout batch."""
    return algorithm.mini_batches * algorithm.epochs


def mismatch_high(algorithm: AlgorithmConfig) -> float:
    """The upper bound of pi_old / mu, or the default of the kind of weight."""
    if algorithm.mismatch_high is not None:
        return algorithm.mismatch_high
    return 5.0 if algorithm.mismatch == "icepop" else 2.0
