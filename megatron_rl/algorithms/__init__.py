"""Policy losses, advantages and their parts: pure functions of tensors (see README.md)."""

from megatron_rl.algorithms.advantages import ADVANTAGES
from megatron_rl.algorithms.interface import LossInputs, LossOutputs
from megatron_rl.algorithms.losses import LOSSES, default_settings, make_settings

__all__ = [
    "ADVANTAGES",
    "LOSSES",
    "LossInputs",
    "LossOutputs",
    "default_settings",
    "make_settings",
]
