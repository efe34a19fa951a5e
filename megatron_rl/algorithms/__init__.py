"""Policy losses, advantages and their parts: pure functions of tensors (see README.md)."""

from megatron_rl.algorithms.interface import LossInputs, LossOutputs, SamplerWeights
from megatron_rl.algorithms.losses import LOSSES, default_settings, make_settings

__all__ = [
    "LOSSES",
    "LossInputs",
    "LossOutputs",
    "SamplerWeights",
    "default_settings",
    "make_settings",
]
