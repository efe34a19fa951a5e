"""Names a config may use for losses, advantages and verifiers.

They are listed here so that a config can be checked without importing torch; a test holds them
equal to what they stand for: ``algorithms.LOSSES`` with the fields of their settings,
``ADVANTAGES``, ``rewards.VERIFIERS``.
"""

LOSS_NAMES = ("grpo", "dr_grpo", "dapo", "gspo", "gmpo", "cispo", "sapo", "rspo", "rspo_v1")
#: Losses with one ratio a sequence, a geometric mean over its tokens.
GEOMETRIC_LOSSES = ("gspo", "gmpo", "rspo", "rspo_v1")
#: Losses that need the router-shift weight; for the others it is a plug-in.
ROUTER_SHIFT_LOSSES = ("rspo", "rspo_v1")
#: The keys ``algorithm.settings`` may have.
LOSS_SETTINGS = {
    **dict.fromkeys(LOSS_NAMES, ("clip_low", "clip_high")),
    "dr_grpo": ("clip_low", "clip_high", "length_divisor"),
    "sapo": ("tau_positive", "tau_negative"),
}
ADVANTAGE_NAMES = ("group_norm", "group_mean", "rloo", "reinforce_pp")
VERIFIER_NAMES = ("countdown", "math", "code")
#: Rollout engines that return the experts of every token.
ENGINES_WITH_ROUTES = ("builtin", "vllm", "sglang")
