"""The words that a truncating sampler left to each token, for the head: others have no probability.

Legend: T tokens, V words, n pairs of a token and a word it may take, U words that any token may.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from megatron_rl.records import KeptTokens


@dataclass(frozen=True)
class KeptWords:
    """Pairs by word, and the words that occur: the head computes logits of no others. Where a token
    may take all words, all occur.
    """

    truncated: torch.Tensor  #: bool [T]; the others may take every word
    tokens: torch.Tensor  #: int64 [n], of the pairs
    columns: torch.Tensor  #: int64 [n], ascending: places of the pairs' words in ``words``
    words: torch.Tensor | None  #: int64 [U], ascending; None: all, and a column is a word
    host_columns: np.ndarray  #: ``columns`` in host memory: looking up bounds waits for no device
    host_words: np.ndarray | None

    @classmethod
    def of(cls, kept: KeptTokens, device: torch.device) -> KeptWords:
        """Of T sets; an empty one stands for all words."""
        truncated = kept.sizes > 0
        order = np.argsort(kept.ids, kind="stable")
        columns, words = kept.ids[order].astype(np.int64), None
        if truncated.all():
            first = np.diff(columns, prepend=-1) > 0
            words, columns = columns[first], np.cumsum(first) - 1

        def tensor(array: np.ndarray) -> torch.Tensor:
            return torch.from_numpy(array).to(device)

        return cls(
            truncated=tensor(truncated),
            tokens=tensor(kept.rows()[order]),
            columns=tensor(columns),
            words=None if words is None else tensor(words),
            host_columns=columns,
            host_words=words,
        )

    def of_rank(self, first: int, count: int) -> RankWords:
        """The part of a rank that holds the ``count`` words from ``first`` on."""
        low, high, words = first, first + count, None
        if self.host_words is not None and self.words is not None:
            low, high = np.searchsorted(self.host_words, [low, high]).tolist()
            words = self.words[low:high] - first
        begin, end = np.searchsorted(self.host_columns, [low, high]).tolist()
        return RankWords(
            self.truncated,
            self.tokens[begin:end],
            self.columns[begin:end] - low,
            self.host_columns[begin:end] - low,
            words,
            high - low,
        )

    def places(self, targets: torch.Tensor, first: int) -> torch.Tensor:
        """Columns int64 [T] of targets, which occur, in the part of the rank whose first word is
        ``first``; outside of it for other ranks' words.
        """
        if self.words is None or self.host_words is None:
            return targets - first
        low = int(np.searchsorted(self.host_words, first))
        return torch.searchsorted(self.words, targets) - low


@dataclass(frozen=True)
class RankWords:
    """The part of `KeptWords` that belongs to a rank's words; words and columns count from its
    first.
    """

    truncated: torch.Tensor  #: bool [T]
    tokens: torch.Tensor  #: int64 [n]
    columns: torch.Tensor  #: int64 [n], ascending
    host_columns: np.ndarray
    words: torch.Tensor | None  #: int64 [U], ascending; None: all
    count: int  #: U, or the number of all words

    def outside(self, columns: slice, spare: torch.Tensor) -> torch.Tensor:
        """bool [T, columns]: the words that a token may not take; ``spare``: its memory, bool."""
        shape = (len(self.truncated), columns.stop - columns.start)
        outside = spare[: shape[0] * shape[1]].view(shape)
        outside.copy_(self.truncated[:, None])
        low, high = np.searchsorted(self.host_columns, [columns.start, columns.stop]).tolist()
        pairs = self.tokens[low:high] * shape[1] + (self.columns[low:high] - columns.start)
        outside.view(-1).index_fill_(0, pairs, False)
        return outside
