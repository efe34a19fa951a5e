"""The advantage estimators. To ship one: a row here, and its function in
``algorithms/advantages.py``.
"""

from __future__ import annotations

from megatron_rl.catalogue.entry import AdvantagesEntry

_CODE = "megatron_rl.algorithms.advantages"

ADVANTAGES: tuple[AdvantagesEntry, ...] = (
    AdvantagesEntry(
        name="group_norm",
        summary="(r - mean) / (std + 1e-6) of the answers to a prompt",
        code=f"{_CODE}:group_norm",
        paper="GRPO, arXiv 2402.03300",
    ),
    AdvantagesEntry(
        name="group_mean",
        summary="r - mean of the answers to a prompt",
        code=f"{_CODE}:group_mean",
        paper="Dr. GRPO, arXiv 2503.20783",
    ),
    AdvantagesEntry(
        name="rloo",
        summary="r - mean of the other answers to the prompt",
        code=f"{_CODE}:rloo",
        paper="RLOO, arXiv 2402.14740",
    ),
    AdvantagesEntry(
        name="reinforce_pp",
        summary="r - mean of the prompt's answers, over the standard deviation of the whole batch",
        code=f"{_CODE}:reinforce_pp",
        paper="REINFORCE++-baseline, arXiv 2501.03262",
    ),
)
