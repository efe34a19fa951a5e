"""Attention of packed sequences whose tokens are spread over context-parallel ranks, without
Transformer Engine.

A rank gathers the keys and values of all ranks and attends with its own queries: two chunks of
every sequence (see `parallel.sequence_shards`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Sequence

import torch
from torch.distributed import ProcessGroup

from megatron_rl.models.attention import (
    Placement,
    dot_product_attention,
    into_buckets,
    out_of_buckets,
    similar_lengths,
)
from megatron_rl.parallel.collectives import gather_first_dim
from megatron_rl.parallel.sequence_shards import SequenceShards


@dataclass(frozen=True)
class _Bucket:
    """S sequences of similar length whose chunks have at most c tokens."""

    num_sequences: int
    chunk: int  #: c
    #: of the earlier and the later chunk: bool [S, 1, c, columns], True where a query may look;
    #: columns: positions of the sequences, from 0
    masks: tuple[torch.Tensor, torch.Tensor]

    @property
    def query_sizes(self) -> list[int]:
        return [self.num_sequences * self.chunk] * 2

    @property
    def key_size(self) -> int:
        return self.num_sequences * self.masks[1].shape[-1]


@dataclass
class ContextPlacement(Placement):
    """This context-parallel rank's tokens of a row of padded sequences.

    Sequences of similar length are laid side by side. Rank r of C sees the first r + 1 chunks of
    keys with its earlier chunk of queries and the first 2C - r with its later one: 2C + 1 together,
    the same on every rank. Padding inside a sequence is behind its tokens, so the causal mask hides
    it from them.
    """

    group: ProcessGroup = field(kw_only=True)
    buckets: tuple[_Bucket, ...] = ()
    #: int64, row of each query entry; padding repeats a valid one
    query_entries: torch.Tensor = field(kw_only=True)
    #: int64 [T / C], entry of each row
    query_places: torch.Tensor = field(kw_only=True)
    #: int64, row of each key entry among all ranks' rows
    key_entries: torch.Tensor = field(kw_only=True)
    #: int64, entries that are no padding: each row once at most
    key_valid: torch.Tensor = field(kw_only=True)

    def attend(  # noqa: D102
        self,
        layer_number: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        both = gather_first_dim(torch.cat([key, value], dim=-1), self.group, sum_gradients=True)
        key_parts = _IntoKeyBuckets.apply(both, self.key_entries, self.key_valid).split(
            [bucket.key_size for bucket in self.buckets]
        )
        query_parts = into_buckets(query, self.query_entries, self.query_places).split(
            [size for bucket in self.buckets for size in bucket.query_sizes]
        )
        widths = [key.shape[-1], value.shape[-1]]
        outputs = []
        for number, (bucket, flat) in enumerate(zip(self.buckets, key_parts, strict=True)):
            keys, values = flat.unflatten(0, (bucket.num_sequences, -1)).split(widths, dim=-1)
            for half, mask in enumerate(bucket.masks):
                queries = query_parts[2 * number + half].unflatten(0, (bucket.num_sequences, -1))
                seen = slice(mask.shape[-1])
                output = dot_product_attention(
                    queries.transpose(1, 2),
                    keys[:, seen].transpose(1, 2),
                    values[:, seen].transpose(1, 2),
                    scale,
                    mask=mask,
                )
                outputs.append(output.transpose(1, 2).flatten(0, 1))
        return out_of_buckets(torch.cat(outputs), self.query_places)


class _IntoKeyBuckets(torch.autograd.Function):
    """Rows [T, ...] -> entries. Padding entries get no weight under the mask, so no gradient; rows
    that this rank does not look at have none either.
    """

    @staticmethod
    def forward(
        ctx: Any, tensor: torch.Tensor, entries: torch.Tensor, valid: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(entries, valid)
        ctx.num_rows = len(tensor)
        return tensor.index_select(0, entries)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        entries, valid = ctx.saved_tensors
        rows = grad.new_zeros(ctx.num_rows, *grad.shape[1:])
        return rows.index_copy_(0, entries[valid], grad.index_select(0, valid)), None, None


def context_placement(
    lengths: Sequence[int], spans: Sequence[int], shards: SequenceShards, device: torch.device
) -> ContextPlacement:
    """This rank's placement of a row.

    Args:
        lengths: of the sequences, without padding.
        spans: of all parts of the row, see `parallel.sequence_shards.padded_spans`.
        shards: how they are spread over the ranks.
    """
    span_of = torch.tensor(spans, dtype=torch.int64)
    starts = span_of.cumsum(0) - span_of
    positions = torch.arange(sum(spans)) - starts.repeat_interleave(span_of)
    tokens = torch.zeros_like(span_of)
    tokens[: len(lengths)] = torch.tensor(lengths, dtype=torch.int64)
    padding = positions >= tokens.repeat_interleave(span_of)
    rows, places = shards.rows.cpu(), shards.places.cpu()
    rank, size = shards.group.rank(), shards.group.size()
    buckets, queries, queries_valid, keys, key_valid = [], [], [], [], []
    for members in similar_lengths(spans):
        chunk = span_of[members, None] // (2 * size)
        bucket, seen = _bucket(chunk, rank, size, device)
        buckets.append(bucket)
        for half in range(2):
            index, valid = _entries(starts[members, None] // size + half * chunk, chunk)
            queries.append(index)
            queries_valid.append(valid)
        index, valid = _entries(starts[members, None], seen)
        keys.append(places[index])
        key_valid.append(valid)
    query_entries, query_valid = torch.cat(queries), torch.cat(queries_valid).nonzero().squeeze(1)
    query_places = torch.empty(len(rows), dtype=torch.int64)
    query_places[query_entries[query_valid]] = query_valid
    return ContextPlacement(
        qkv_format="packed",
        positions=positions[rows].to(device),
        padding=padding[rows].to(device),
        group=shards.group,
        buckets=tuple(buckets),
        query_entries=query_entries.to(device),
        query_places=query_places.to(device),
        key_entries=torch.cat(keys).to(device),
        key_valid=torch.cat(key_valid).nonzero().squeeze(1).to(device),
    )


def _entries(first: torch.Tensor, count: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows first..first + count - 1 of S sequences ([S, 1] each) laid out as [S, longest], and
    which are valid; both flat. Padding repeats the last row of its sequence.
    """
    column = torch.arange(int(count.max()))
    index = first + torch.minimum(column, count - 1)
    return index.flatten(), (column < count).flatten()


def _bucket(
    chunk: torch.Tensor, rank: int, size: int, device: torch.device
) -> tuple[_Bucket, torch.Tensor]:
    """Masks of the sequences whose chunks have ``chunk`` int64 [S, 1] tokens, and how many keys of
    each this rank sees.
    """
    longest = int(chunk.max())
    column = torch.minimum(torch.arange(longest), chunk - 1)

    def mask(number: int) -> torch.Tensor:
        position = number * chunk + column
        keys = torch.arange((number + 1) * longest)
        return (keys <= position[..., None])[:, None].to(device)

    masks = (mask(rank), mask(2 * size - 1 - rank))
    return _Bucket(len(chunk), longest, masks), (2 * size - rank) * chunk
