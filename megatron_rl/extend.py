"""What a loss, reward, advantage estimator or sampler correction of a user's own imports.

No torch. ``LossInputs``, ``LossOutputs`` and ``SamplerWeights`` are in ``megatron_rl.algorithms``.
"""

from megatron_rl.catalogue.declare import advantages, correction, loss, verifier
from megatron_rl.catalogue.settings import Settings
from megatron_rl.errors import UserError
from megatron_rl.rewards.base import Reward, require

__all__ = [
    "Reward",
    "Settings",
    "UserError",
    "advantages",
    "correction",
    "loss",
    "require",
    "verifier",
]
