"""Which predictions of a pack are trained: only for these does the head compute anything. Those of
prompts, of last tokens and of padding are not.
"""

from __future__ import annotations

import numpy as np
import torch

from megatron_rl.parallel.sequence_shards import SequenceShards
from megatron_rl.policy.shared_rows import SharedRows
from megatron_rl.records import Pack

#: The share of predictions that have to be left out: less is not worth the copies.
LEAST_LEFT_OUT = 1 / 8


def predicting(
    pack: Pack, shards: SequenceShards, shared: SharedRows | None, device: torch.device
) -> torch.Tensor | None:
    """Places among this rank's predictions, int64; see `PackTensors.predicting`."""
    if shared is None:
        trained = pack.mask[shards.rows.cpu().numpy()]
    elif shards.group.size() > 1:
        return None
    else:
        trained = np.zeros(pack.num_rows + len(shared.extra_rows), dtype=bool)
        trained[shared.reads.cpu().numpy()[pack.mask]] = True
    if trained.mean() > 1 - LEAST_LEFT_OUT:
        return None
    return torch.from_numpy(trained.nonzero()[0]).to(device)
