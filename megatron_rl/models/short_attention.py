"""Attention among few keys on a CPU, as one autograd function.

torch's kernel works through long sequences block by block and keeps no probabilities. Where they
are few it takes longer than two products of a whole bucket with a softmax between them, and its way
back twice as long.

Legend: T rows, G groups of n heads, S segments of a bucket, A queries and L keys of each.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

#: Keys of a query at most. Up to 64 forward and backward pass took 0.56 to 0.83 of the time of
#: torch's kernel, at 128 as long (measured).
LONGEST = 64
_NOTHING = torch.zeros(())  #: what a product is added to
_softmax_backward = torch.ops.aten._softmax_backward_data


@dataclass(frozen=True)
class ShortBucket:
    """Segments side by side; ``sees``: bool [S or 1, A, L], which keys a query sees, one at least.
    A key that no valid query sees may be any.
    """

    segments: int
    sees: torch.Tensor

    @property
    def sizes(self) -> tuple[int, int]:
        """Query entries and key entries, S A and S L."""
        _, queries, keys = self.sees.shape
        return self.segments * queries, self.segments * keys


@dataclass(frozen=True)
class _Entries:
    """Where the entries of G groups come from: a row of a group is row x G + group. In a bucket
    they are [S, G, A] or [S, G, L], so that each group's heads are one matrix.
    """

    queries: torch.Tensor  #: int64 [G sum S A], the row of each query entry
    places: torch.Tensor  #: int64 [T G], the query entry of each row
    keys: torch.Tensor  #: int64 [G sum S L], the row of each key entry
    readers: torch.Tensor  #: int64, the valid key entries, by row
    first: torch.Tensor  #: int64 [T G], where a row's readers begin


class ShortAttention:
    """The attention of a placement whose longest row of keys is at most `LONGEST`."""

    def __init__(
        self,
        buckets: Sequence[ShortBucket],
        query_entries: torch.Tensor,
        query_places: torch.Tensor,
        key_entries: torch.Tensor,
        key_valid: torch.Tensor,
    ) -> None:
        """
        Args:
            buckets: their entries lie one behind the other, [S, A] and [S, L].
            query_entries: int64 [sum S A], row of each query entry.
            query_places: int64 [T], the one query entry of each row that is no padding.
            key_entries: int64 [sum S L]. key_valid: bool, which of them count for gradients.
        """
        self._buckets = buckets
        self._masks = [torch.where(b.sees, 0.0, -torch.inf)[:, None, :, None, :] for b in buckets]
        valid = key_valid.nonzero().squeeze(1)
        self._rows = query_entries, query_places, key_entries, valid
        self._entries: dict[int, _Entries] = {}

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """See `Placement.attend`. bf16 is computed in fp32."""
        dtype = query.dtype
        if dtype == torch.bfloat16:
            query, key, value = query.float(), key.float(), value.float()
        return _Attend.apply(query, key, value, self, scale).to(dtype)

    def entries(self, groups: int) -> _Entries:
        """Made when they are first asked for."""
        if groups not in self._entries:
            self._entries[groups] = self._spread(groups)
        return self._entries[groups]

    def _spread(self, groups: int) -> _Entries:
        query_entries, query_places, key_entries, valid = self._rows
        group = torch.arange(groups)
        queries, keys = (
            _places([(b.segments, b.sees.shape[axis]) for b in self._buckets], groups)
            for axis in (1, 2)
        )
        of_queries, of_keys = torch.empty_like(queries), torch.empty_like(keys)
        of_queries.view(-1)[queries] = query_entries[:, None] * groups + group
        of_keys.view(-1)[keys] = key_entries[:, None] * groups + group
        rows = (key_entries[valid][:, None] * groups + group).flatten()
        counts = rows.new_zeros(len(query_places) * groups)
        counts.index_add_(0, rows, torch.ones_like(rows))
        return _Entries(
            queries=of_queries.flatten(),
            places=queries[query_places].flatten(),
            keys=of_keys.flatten(),
            readers=keys[valid].flatten()[rows.argsort(stable=True)],
            first=counts.cumsum(0) - counts,
        )

    def parts(
        self, groups: int, of_queries: Sequence[torch.Tensor], of_keys: Sequence[torch.Tensor]
    ) -> Iterator[tuple[torch.Tensor, ...]]:
        """Of each bucket the mask [S or 1, 1, A, 1, L], and its part of all these tensors: of query
        entries [N, n, d] as [S G, A n, d], of key entries [N, d] as [S G, L, d].
        """
        sizes = [[groups * size for size in bucket.sizes] for bucket in self._buckets]
        split = [tensor.split([queries for queries, _ in sizes]) for tensor in of_queries]
        split += [tensor.split([keys for _, keys in sizes]) for tensor in of_keys]
        for number, bucket in enumerate(self._buckets):
            batch = bucket.segments * groups
            mine = [part[number] for part in split]
            yield self._masks[number], *(t.view(batch, -1, t.shape[-1]) for t in mine)


def _places(sizes: Sequence[tuple[int, int]], groups: int) -> torch.Tensor:
    """Buckets' entries [S, A] one behind the other -> those [S, G, A], int64 [sum S A, G]."""
    found, start = [], 0
    for segments, length in sizes:
        count = segments * groups * length
        here = torch.arange(start, start + count).view(segments, groups, length)
        found.append(here.transpose(1, 2).reshape(-1, groups))
        start += count
    return torch.cat(found)


class _Attend(torch.autograd.Function):
    """With P = softmax(scale Q K^T) and g the gradient of P V:

    d V = P^T g,    d S = P (g V^T - their row sum of P g V^T),    d Q = scale d S K,
    d K = scale (d S)^T Q
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        short: ShortAttention,
        scale: float,
    ) -> torch.Tensor:
        rows, groups, width = value.shape
        at = short.entries(groups)
        queries = _by_group(query, groups).index_select(0, at.queries)
        keys, values = (t.flatten(0, 1).index_select(0, at.keys) for t in (key, value))
        output = queries.new_empty(*queries.shape[:2], width)
        kept = []
        parts = short.parts(groups, (queries, output), (keys, values))
        for mask, q, out, k, v in parts:
            if k.shape[1] == 1:  # padding: it sees itself
                out.copy_(v)
                kept.append(mask)
                continue
            scores = torch.baddbmm(_NOTHING.to(q), q, k.mT, beta=0, alpha=scale)
            shape = (-1, groups, mask.shape[2], queries.shape[1], mask.shape[4])
            scores.view(shape).add_(mask)
            kept.append(scores.softmax(-1))
            torch.bmm(kept[-1], v, out=out)
        ctx.save_for_backward(queries, keys, values, *kept)
        ctx.short, ctx.scale, ctx.groups = short, scale, groups
        return output.index_select(0, at.places).view(rows, -1, width)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        queries, keys, values, *kept = ctx.saved_tensors
        groups, scale, rows = ctx.groups, ctx.scale, len(grad)
        at = ctx.short.entries(groups)
        grad = _by_group(grad, groups)
        entries = grad.new_zeros(len(queries), *grad.shape[1:])  # of padding they stay 0
        entries.index_copy_(0, at.places, grad)
        to_queries, to_keys, to_values = map(torch.empty_like, (queries, keys, values))
        parts = ctx.short.parts(
            groups, (queries, entries, to_queries), (keys, values, to_keys, to_values)
        )
        none = _NOTHING.to(queries)
        for probs, (_, q, g, to_q, k, v, to_k, to_v) in zip(kept, parts, strict=True):
            if k.shape[1] == 1:
                torch.sum(g, 1, keepdim=True, out=to_v)
                to_q.zero_(), to_k.zero_()
                continue
            torch.bmm(probs.mT, g, out=to_v)
            slope = _softmax_backward(torch.bmm(g, v.mT), probs, -1, probs.dtype)
            torch.baddbmm(none, slope, k, beta=0, alpha=scale, out=to_q)
            torch.baddbmm(none, slope.mT, q, beta=0, alpha=scale, out=to_k)
        shape = rows, groups, -1
        return (
            to_queries.index_select(0, at.places).view(rows, -1, queries.shape[-1]),
            *(
                F.embedding_bag(at.readers, t, at.first, mode="sum").view(shape)
                for t in (to_keys, to_values)
            ),
            None,
            None,
        )


def _by_group(heads: torch.Tensor, groups: int) -> torch.Tensor:
    """[T, G n, d] -> [T G, n, d]."""
    return heads.reshape(len(heads) * groups, -1, heads.shape[-1])
