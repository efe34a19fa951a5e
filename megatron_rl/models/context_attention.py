"""Attention of packed sequences whose tokens are spread over context-parallel ranks, without
Transformer Engine.

A rank gathers the keys and values of all ranks and attends with its own queries: two chunks of
every sequence (see `parallel.sequence_shards`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Sequence

import torch
from torch.distributed import ProcessGroup

from megatron_rl.models.attention import (
    Placement,
    dot_product_attention,
    into_buckets,
    out_of_buckets,
)
from megatron_rl.models.shared_attention import RowReads, entries_of, row_reads, similar_segments
from megatron_rl.parallel.collectives import gather_first_dim
from megatron_rl.parallel.sequence_shards import SequenceShards


@dataclass(frozen=True)
class _Bucket:
    """S segments of similar length whose chunks have at most c tokens, and that continue prompts of
    at most P tokens.
    """

    num_sequences: int
    chunk: int  #: c
    #: of the earlier and the later chunk: bool [S, 1, c, columns], True where a query may look;
    #: columns: P of the prompts, then the segments' own, from 0
    masks: tuple[torch.Tensor, torch.Tensor]

    @property
    def query_sizes(self) -> list[int]:
        return [self.num_sequences * self.chunk] * 2

    @property
    def key_size(self) -> int:
        return self.num_sequences * self.masks[1].shape[-1]


@dataclass
class ContextPlacement(Placement):
    """This context-parallel rank's tokens of a row of padded segments: sequences, prompts, and
    answers that continue a prompt (see `records.SharedRow`).

    Segments of similar length are laid side by side. Rank r of C sees the first r + 1 chunks of
    keys with its earlier chunk of queries and the first 2C - r with its later one: 2C + 1 together,
    the same on every rank; queries of an answer see its whole prompt besides. Padding inside a
    segment is behind its tokens, so the causal mask hides it from them.
    """

    group: ProcessGroup = field(kw_only=True)
    buckets: tuple[_Bucket, ...] = ()
    #: int64, row of each query entry; padding repeats a valid one
    query_entries: torch.Tensor = field(kw_only=True)
    #: int64 [T / C], entry of each row
    query_places: torch.Tensor = field(kw_only=True)
    keys: RowReads = field(kw_only=True)  #: of the key entries, among all ranks' rows

    def attend(  # noqa: D102
        self,
        layer_number: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        both = gather_first_dim(torch.cat([key, value], dim=-1), self.group, sum_gradients=True)
        key_parts = self.keys.read(both).split([bucket.key_size for bucket in self.buckets])
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


def context_placement(
    lengths: Sequence[int],
    spans: Sequence[int],
    shards: SequenceShards,
    device: torch.device,
    parents: Sequence[int] = (),
) -> ContextPlacement:
    """This rank's placement of a row.

    Args:
        lengths: of the segments, without padding.
        spans: of all parts of the row, see `parallel.sequence_shards.padded_spans`.
        shards: how they are spread over the ranks.
        device: where the tensors go.
        parents: the number of the segment that each segment continues, or -1; empty: none does.
    """
    span_of = torch.tensor(spans, dtype=torch.int64)
    starts = span_of.cumsum(0) - span_of
    tokens = torch.zeros_like(span_of)
    tokens[: len(lengths)] = torch.tensor(lengths, dtype=torch.int64)
    parent = torch.full_like(span_of, -1)
    parent[: len(parents)] = torch.tensor(parents, dtype=torch.int64)
    prompt = torch.where(parent < 0, 0, tokens[parent])
    within = torch.arange(sum(spans)) - starts.repeat_interleave(span_of)
    padding = within >= tokens.repeat_interleave(span_of)
    positions = within + prompt.repeat_interleave(span_of)
    rows, places = shards.rows.cpu(), shards.places.cpu()
    rank, size = shards.group.rank(), shards.group.size()
    buckets, queries, queries_valid, keys, keys_valid = [], [], [], [], []
    for some in similar_segments(spans, prompt.tolist()):
        members = torch.tensor(some)
        chunk = span_of[members] // (2 * size)
        front, front_valid = entries_of(starts[parent[members]], prompt[members])
        own, own_valid = entries_of(starts[members], (2 * size - rank) * chunk)
        for half in range(2):
            index, valid = entries_of(starts[members] // size + half * chunk, chunk)
            queries.append(index.flatten())
            queries_valid.append(valid.flatten())
        keys.append(places[torch.cat([front, own], dim=1)].flatten())
        keys_valid.append(torch.cat([front_valid, own_valid], dim=1).flatten())
        buckets.append(_bucket(chunk[:, None], front_valid, rank, size, device))
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
        keys=row_reads(torch.cat(keys), torch.cat(keys_valid), device),
    )


def _bucket(
    chunk: torch.Tensor, front_valid: torch.Tensor, rank: int, size: int, device: torch.device
) -> _Bucket:
    """Masks of segments whose chunks have ``chunk`` int64 [S, 1] tokens and whose prompts fill
    ``front_valid`` bool [S, P].
    """
    longest = int(chunk.max())
    column = torch.minimum(torch.arange(longest), chunk - 1)
    front = front_valid[:, None].expand(-1, longest, -1)

    def mask(number: int) -> torch.Tensor:
        position = number * chunk + column
        keys = torch.arange((number + 1) * longest)
        own = keys <= position[..., None]
        return torch.cat([front, own], dim=-1)[:, None].to(device)

    return _Bucket(len(chunk), longest, (mask(rank), mask(2 * size - 1 - rank)))
