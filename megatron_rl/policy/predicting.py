"""Which predictions of a pack are trained: only for these does the head compute anything. Those of
prompts and of padding are not.
"""

from __future__ import annotations

import numpy as np
import torch

from megatron_rl.parallel.kept_words import KeptWords
from megatron_rl.parallel.sequence_shards import SequenceShards
from megatron_rl.policy.shared_rows import SharedRows
from megatron_rl.records import Pack

#: The share of predictions that have to be left out: less is not worth the copies.
LEAST_LEFT_OUT = 1 / 8


def predicting(pack: Pack, shards: SequenceShards, shared: SharedRows | None) -> np.ndarray | None:
    """The pack's token that each of this rank's predictions (of its rows, then the extra ones of
    shared rows) stands for, int64: the first that is trained; -1: none is. None: nearly all are
    trained, or not known. A pack with kept tokens always knows.
    """
    tokens = np.arange(pack.num_tokens)
    if shared is None:
        rows = shards.rows.cpu().numpy()
        found = np.where(pack.mask[rows], tokens[rows], -1)
    elif shards.group.size() > 1 and pack.kept is None:
        return None
    else:
        found = _of_shared_rows(pack, shards, shared)
    if pack.kept is None and (found >= 0).mean() > 1 - LEAST_LEFT_OUT:
        return None
    return found


def _of_shared_rows(pack: Pack, shards: SequenceShards, shared: SharedRows) -> np.ndarray:
    extra, group = len(shared.extra_rows), shards.group
    found = np.full(pack.num_rows + extra * group.size(), -1, dtype=np.int64)
    trained = np.flatnonzero(pack.mask)[::-1]  # the first is written last
    found[shared.reads.cpu().numpy()[trained]] = trained
    first = pack.num_rows + extra * group.rank()
    own = found[: pack.num_rows][shards.rows.cpu().numpy()]
    return np.concatenate([own, found[first : first + extra]])


def kept_words(pack: Pack, found: np.ndarray, device: torch.device) -> KeptWords | None:
    """What the sampler kept for the trained of these predictions, see `predicting`; None: the pack
    has no kept tokens.
    """
    return None if pack.kept is None else KeptWords.of(pack.kept.select(found[found >= 0]), device)
