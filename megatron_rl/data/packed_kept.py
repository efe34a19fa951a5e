"""The sampler's kept tokens in a pack: the set of each trained target."""

from __future__ import annotations

from typing import Sequence

import numpy as np

from megatron_rl.records import KeptTokens, Sample


def check_kept(index: int, sample: Sample) -> None:
    """Check the kept tokens: a set for each token, and each trained token in its own.

    Raises:
        ValueError: they are others; ``index`` names the sample.
    """
    length, kept = len(sample.tokens), sample.kept
    if kept is None or len(kept.sizes) != length:
        found = "no" if kept is None else len(kept.sizes)
        raise ValueError(f"sample {index}: {found} sets of kept tokens for {length} tokens")
    wrong = np.flatnonzero(kept.missing(sample.tokens)[1:] & sample.trained)
    if len(wrong):
        raise ValueError(f"sample {index}: token {wrong[0] + 1} is outside of its kept set")


def kept_of_targets(samples: Sequence[Sample], mask: np.ndarray) -> KeptTokens:
    """T sets of the targets in a pack with these samples, one behind the other; ``mask`` bool [T]:
    the trained ones, others have none.
    """
    every, first, trained = [], 0, [np.zeros(0, dtype=np.int64)]
    for sample in samples:
        assert sample.kept is not None, "all samples of these packs have them"
        every.append(sample.kept)
        trained.append(first + 1 + np.flatnonzero(sample.trained))
        first += len(sample.tokens)
    places = np.full(len(mask), -1, dtype=np.int64)
    places[mask] = np.concatenate(trained)
    return KeptTokens.join(every).select(places)
