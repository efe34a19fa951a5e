"""Names a config may use for losses, advantages and verifiers.

They are listed here so that a config can be checked without importing torch; a test holds them
equal to the dicts they stand for: ``algorithms.LOSSES`` and ``ADVANTAGES``, ``rewards.VERIFIERS``.
"""

LOSS_NAMES = ("grpo", "dr_grpo", "dapo", "gspo", "gmpo", "cispo", "sapo", "rspo", "rspo_v1")
ADVANTAGE_NAMES = ("group_norm", "group_mean", "rloo", "reinforce_pp")
VERIFIER_NAMES = ("countdown", "math", "code")
