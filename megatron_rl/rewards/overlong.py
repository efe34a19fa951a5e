"""Soft overlong punishment: answers near the length limit lose part of their reward."""

from __future__ import annotations


def overlong_offset(length: int, longest: int, buffer: int, penalty: float) -> float:
    """The change of an answer's reward by its ``length`` in tokens, in [-penalty, 0].

    0 up to longest - buffer tokens, then falling linearly to -penalty at ``longest`` and beyond:
    DAPO, arXiv 2503.14476, eq. 13, where L_max is ``longest``, L_cache ``buffer`` and the penalty
    1. ``buffer`` >= 1.
    """
    excess = length - (longest - buffer)
    return -penalty * min(max(excess / buffer, 0.0), 1.0) if excess > 0 else 0.0
