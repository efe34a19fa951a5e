"""Packs whose sequences share prompts, on the device: from the rows that the model runs on to the
tokens that losses see, and back.

A row stands for one token of each sequence that shares it. Its routers' distance is that of all of
them. The last row of a prompt predicts the first token of every answer, so the head reads it once
for each.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from megatron_rl.parallel.collectives import gather_first_dim
from megatron_rl.parallel.sequence_shards import SequenceShards
from megatron_rl.records import Pack


@dataclass(frozen=True)
class SharedRows:
    """The row that the model runs on, and how the pack reads it. Whole on every context rank, but
    for ``extra_rows``.

    The row makes R predictions, each row its own, and E extra ones, of rows that predict another
    target as well, or the same one among other kept tokens.
    """

    tokens: torch.Tensor  #: int64 [R]
    places: torch.Tensor  #: int64 [T], the row of each token of the pack
    trained: torch.Tensor  #: int64 [R], how many trained predictions each row stands for
    targets: torch.Tensor  #: int64 [R], the target of each row's own prediction
    extra_rows: torch.Tensor  #: int64 [E], among this rank's; 0 where another rank has it
    extra_targets: torch.Tensor  #: int64 [E]
    #: int64 [T], the prediction of each token of the pack: R, then E of each context rank
    reads: torch.Tensor

    def predictions(
        self, own: torch.Tensor, extra: torch.Tensor, shards: SequenceShards
    ) -> torch.Tensor:
        """Values of this rank's own [R / context] and extra [E] predictions -> those of the pack's
        tokens, [T], differentiable. A collective.
        """
        every = torch.cat([shards.whole(own), gather_first_dim(extra, shards.group)])
        return every.index_select(0, self.reads)


def shared_rows(pack: Pack, shards: SequenceShards, device: torch.device) -> SharedRows | None:
    """The tensors of a pack's shared row; None: it has none."""
    if pack.shared is None:
        return None
    places, num_rows = pack.shared.places, pack.num_rows
    here = pack.sequence_ids < pack.num_sequences
    own = np.zeros((2, num_rows), dtype=np.int64)
    wanted = np.stack([pack.targets, _kinds_of_sets(pack)])
    own[:, places[here][::-1]] = wanted[:, here][:, ::-1]  # of its first token, the last written
    targets, other = own[0], here & (wanted != own[:, places]).any(axis=0)
    (rows, extra_targets, _), number = np.unique(
        np.concatenate([places[None, other], wanted[:, other]]), axis=1, return_inverse=True
    )
    local, size = num_rows // shards.group.size(), len(rows)
    at = shards.places.cpu().numpy()
    reads = places.copy()
    reads[other] = num_rows + at[places[other]] // local * size + number.reshape(-1)
    mine = at[rows] // local == shards.group.rank()

    def tensor(array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(device)

    return SharedRows(
        tokens=tensor(pack.shared.tokens),
        places=tensor(places),
        trained=tensor(np.bincount(places[pack.mask], minlength=num_rows)),
        targets=tensor(targets),
        extra_rows=tensor(np.where(mine, at[rows] % local, 0)),
        extra_targets=tensor(extra_targets),
        reads=tensor(reads),
    )


def _kinds_of_sets(pack: Pack) -> np.ndarray:
    """int64 [T], equal for trained tokens of one row if they have the same kept tokens; 0 for all
    that have their row for themselves. Two answers' first tokens may have been sampled in different
    batches, whose rounding may differ.
    """
    kinds = np.zeros(pack.num_tokens, dtype=np.int64)
    if pack.kept is None or pack.shared is None:
        return kinds
    places = pack.shared.places
    shared = np.bincount(places[pack.mask], minlength=pack.num_rows) > 1
    found: dict[bytes, int] = {}
    for token in np.flatnonzero(pack.mask & shared[places]):
        ids = pack.kept.ids[slice(*pack.kept.offsets[token : token + 2])]
        kinds[token] = found.setdefault(np.sort(ids).tobytes(), len(found))
    return kinds


def row_counts(pack: Pack, shards: SequenceShards, device: torch.device) -> torch.Tensor | None:
    """How many tokens each of this context rank's rows stands for, int64 [R / context], 0 on
    padding; None: no row is shared.
    """
    if pack.shared is None:
        return None
    here = pack.sequence_ids < pack.num_sequences
    counts = np.bincount(pack.shared.places[here], minlength=pack.num_rows)
    return shards.local(torch.from_numpy(counts).to(device))
