"""The optimizers with their settings. To ship one: a row here, and its class in ``optimizers/``."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from megatron_rl.catalogue.entry import OptimizerEntry
from megatron_rl.catalogue.settings import Positive, Settings


class AdamSettings(Settings):
    """Adam's."""

    beta1: float = Field(0.9, ge=0.0, lt=1.0)
    """Decay of the mean of the gradients, per step; optimizer.beta1 sets it too."""
    beta2: float = Field(0.95, ge=0.0, lt=1.0)
    """Decay of the mean of their squares, per step; optimizer.beta2 sets it too."""
    epsilon: Positive = 1e-8
    """Added to the root of the mean square before dividing; optimizer.epsilon sets it too."""


class MuonSettings(AdamSettings):
    """Settings of Muon, and of Adam, which steps all weights but the layers' matrices."""

    momentum: float = Field(0.95, ge=0.0, lt=1.0)
    """Decay of the mean of the gradients of a matrix, per step."""
    nesterov: bool = True
    """Nesterov momentum: step along the mean as the next gradient, if equal, would make it."""
    newton_schulz_steps: int = Field(5, ge=1, le=20)
    """Newton-Schulz steps that make a direction orthogonal."""
    scale: Literal["rms", "spectral"] = "rms"
    """Size of a step of a matrix [m, n]. rms: times 0.2 sqrt(max(m, n)), elements as large as in
    Adam's steps, so that both take optimizer.lr (arXiv 2502.16982); spectral: times
    sqrt(max(1, m / n)) (Keller Jordan)."""
    scale_factor: Positive = 1.0
    """Ratio of the matrices' learning rate to optimizer.lr, which the other weights have."""
    routers: bool = False
    """Whether routers, and gates of shared experts, are stepped by Muon as well."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Type of the products of the iteration; momentum and weights are fp32."""


OPTIMIZERS: tuple[OptimizerEntry, ...] = (
    OptimizerEntry(
        name="adam",
        summary="Adam with decoupled weight decay",
        code="megatron.core.optimizer:get_megatron_optimizer",
        settings=AdamSettings,
        paper="arXiv 1412.6980, 1711.05101",
        of_megatron=True,
        split_weights=True,
    ),
    OptimizerEntry(
        name="muon",
        summary="orthogonalised momentum for the matrices of the layers, Adam for the rest",
        code="megatron_rl.optimizers.muon:Muon",
        settings=MuonSettings,
        paper="Keller Jordan 2024; arXiv 2502.16982",
        split_weights=True,
        matrix_moments=1,
    ),
)
