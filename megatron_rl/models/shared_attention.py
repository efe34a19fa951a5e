"""Attention of packed sequences that share prompts, without Transformer Engine.

A row holds segments: whole sequences, prompts, and answers that continue a prompt (see
`records.SharedRow`). A query of an answer sees the whole prompt and its own segment up to itself.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Iterator, Sequence

import torch

from megatron_rl.models.attention import (
    Placement,
    causal_attention,
    dot_product_attention,
    into_buckets,
    out_of_buckets,
    similar_lengths,
)
from megatron_rl.models.short_attention import LONGEST, ShortAttention, ShortBucket


@dataclass(frozen=True)
class RowReads:
    """Which rows are read, some of them by several entries, and the way back for gradients.

    The gradient of a row is the sum of its valid entries', added up in one order on every device.
    """

    entries: torch.Tensor  #: int64 [N], the row of each entry
    once: tuple[torch.Tensor, torch.Tensor]  #: int64 rows that one valid entry reads, and it
    many: torch.Tensor  #: int64 [Q], rows that several valid entries read
    readers: torch.Tensor  #: int64 [Q, most], these entries
    valid: torch.Tensor  #: bool [Q, most], False beyond a row's last reader

    def read(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows [T, ...] -> entries [N, ...], differentiable. Gradients of entries that are not
        valid are dropped.
        """
        return _Read.apply(rows, self)


class _Read(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, reads: RowReads) -> torch.Tensor:
        ctx.reads, ctx.num_rows = reads, len(rows)
        return rows.index_select(0, reads.entries)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        reads: RowReads = ctx.reads
        rows = grad.new_zeros(ctx.num_rows, *grad.shape[1:])
        place, entry = reads.once
        rows.index_copy_(0, place, grad.index_select(0, entry))
        if len(reads.many):
            several = grad.index_select(0, reads.readers.flatten()).unflatten(
                0, reads.readers.shape
            )
            several.mul_(reads.valid.view(*reads.valid.shape, *[1] * (grad.dim() - 1)))
            rows.index_copy_(0, reads.many, several.sum(dim=1))
        return rows, None


def row_reads(entries: torch.Tensor, valid: torch.Tensor, device: torch.device) -> RowReads:
    """The reads of ``entries`` int64 [N], of which ``valid`` bool [N] count for gradients."""
    entry = valid.nonzero().squeeze(1)
    order = entries[entry].argsort(stable=True)
    rows, counts = entries[entry][order].unique_consecutive(return_counts=True)
    first = counts.cumsum(0) - counts
    one = counts == 1
    column = torch.arange(max(counts.tolist(), default=0))
    inside = column < counts[~one, None]
    index = first[~one, None] + torch.minimum(column, counts[~one, None] - 1)
    readers = entry[order][index]
    return RowReads(
        entries=entries.to(device),
        once=(rows[one].to(device), entry[order][first[one]].to(device)),
        many=rows[~one].to(device),
        readers=readers.to(device),
        valid=inside.to(device),
    )


def similar_segments(lengths: Sequence[int], prompts: Sequence[int]) -> Iterator[list[int]]:
    """The segments in groups of similar length that continue prompts of similar length, or none."""
    for members in similar_lengths(prompts):
        for some in similar_lengths([lengths[member] for member in members]):
            yield [members[number] for number in some]


@dataclass(frozen=True)
class _Bucket:
    """S segments of similar length; ``mask``: see `SharedPlacement`."""

    num_segments: int
    longest: int  #: of the segments, A
    prompt: int  #: longest prompt that they continue, P; 0: none
    mask: torch.Tensor | None  #: bool [S or 1, 1, A, P + A]; None: causal


@dataclass
class SharedPlacement(Placement):
    """Segments one behind the other, of which some continue others, then padding.

    Segments of similar length that continue prompts of similar length are laid side by side: their
    queries [S, A], their keys [S, P + A] with the prompts in front.
    """

    buckets: tuple[_Bucket, ...] = ()
    #: int64, row of each query entry; padding repeats a valid one
    query_entries: torch.Tensor = field(kw_only=True)
    query_places: torch.Tensor = field(kw_only=True)  #: int64 [T], entry of each row
    keys: RowReads = field(kw_only=True)
    short: ShortAttention | None = None  #: how all of it attends; None: by torch's kernels

    def attend(  # noqa: D102
        self,
        layer_number: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        if self.short is not None:
            return self.short.attend(query, key, value, scale)
        queries = into_buckets(query, self.query_entries, self.query_places).split(
            [bucket.num_segments * bucket.longest for bucket in self.buckets]
        )
        sizes = [bucket.num_segments * (bucket.prompt + bucket.longest) for bucket in self.buckets]
        keys, values = (self.keys.read(tensor).split(sizes) for tensor in (key, value))
        outputs = []
        for bucket, *flat in zip(self.buckets, queries, keys, values, strict=True):
            q, k, v = (tensor.unflatten(0, (bucket.num_segments, -1)) for tensor in flat)
            if bucket.mask is None:
                output = causal_attention(q, k, v, scale)
            else:
                q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
                output = dot_product_attention(q, k, v, scale, mask=bucket.mask).transpose(1, 2)
            outputs.append(output.flatten(0, 1))
        return out_of_buckets(torch.cat(outputs), self.query_places)


def shared_placement(
    lengths: Sequence[int], parents: Sequence[int], num_rows: int, device: torch.device
) -> SharedPlacement:
    """The placement of a row of ``num_rows`` tokens that begins with these segments, one behind the
    other. ``parents``: the number of the segment that each continues, which continues none; or -1.
    """
    padding = num_rows - sum(lengths)
    if padding < 0:
        raise ValueError(f"segments of {sum(lengths)} tokens do not fit a row of {num_rows}")
    length = torch.tensor([*lengths, *[1] * padding], dtype=torch.int64)
    parent = torch.tensor([*parents, *[-1] * padding], dtype=torch.int64)
    start = length.cumsum(0) - length
    prompt = torch.where(parent < 0, 0, length[parent])
    query_entries, query_valid, key_entries, key_valid, buckets = [], [], [], [], []
    for some in similar_segments(length.tolist(), prompt.tolist()):
        members = torch.tensor(some)
        own, own_valid = entries_of(start[members], length[members])
        front, front_valid = entries_of(start[parent[members]], prompt[members])
        query_entries.append(own.flatten())
        query_valid.append(own_valid.flatten())
        key_entries.append(torch.cat([front, own], dim=1).flatten())
        key_valid.append(torch.cat([front_valid, own_valid], dim=1).flatten())
        buckets.append(_bucket(front_valid, own.shape[1], device))
    queries, keys, valid = map(torch.cat, (query_entries, key_entries, key_valid))
    places = torch.empty(num_rows, dtype=torch.int64)
    here = torch.cat(query_valid).nonzero().squeeze(1)
    places[queries[here]] = here
    positions = torch.arange(num_rows) - (start - prompt).repeat_interleave(length)
    return SharedPlacement(
        qkv_format="packed",
        positions=positions.to(device),
        padding=(torch.arange(num_rows) >= num_rows - padding).to(device),
        buckets=tuple(buckets),
        query_entries=queries.to(device),
        query_places=places.to(device),
        keys=row_reads(keys, valid, device),
        short=_short(buckets, queries, places, keys, valid)
        if torch.device(device).type == "cpu"
        else None,
    )


def _short(
    buckets: Sequence[_Bucket],
    query_entries: torch.Tensor,
    query_places: torch.Tensor,
    key_entries: torch.Tensor,
    key_valid: torch.Tensor,
) -> ShortAttention | None:
    """The attention of these buckets; None: they are too long for it."""
    if max((bucket.prompt + bucket.longest for bucket in buckets), default=0) > LONGEST:
        return None
    found = []
    for bucket in buckets:
        sees = torch.ones(1, bucket.longest, bucket.longest, dtype=torch.bool).tril()
        found.append(
            ShortBucket(bucket.num_segments, sees if bucket.mask is None else bucket.mask[:, 0])
        )
    return ShortAttention(found, query_entries, query_places, key_entries, key_valid)


def entries_of(first: torch.Tensor, count: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows first..first + count - 1 of S segments (int64 [S] each) laid out as [S, longest], and
    which are valid, bool [S, longest]. Padding repeats the last row of its segment, or the first of
    one without rows.
    """
    column = torch.arange(int(count.max()))
    index = first[:, None] + torch.minimum(column, count[:, None] - 1).clamp(min=0)
    return index, column < count[:, None]


def _bucket(front_valid: torch.Tensor, longest: int, device: torch.device) -> _Bucket:
    segments, prompt = front_valid.shape
    if not prompt:
        return _Bucket(segments, longest, 0, None)
    if front_valid.all():
        front_valid = front_valid[:1]
    front = front_valid[:, None, None].expand(-1, 1, longest, -1)
    own = torch.ones(longest, longest, dtype=torch.bool).tril().expand(len(front), 1, -1, -1)
    return _Bucket(segments, longest, prompt, torch.cat([front, own], dim=-1).to(device))
