"""Attention over packed sequences without Transformer Engine, and the placements that tell it where
tokens belong.

A *placement* travels through Megatron in the place of its packed-sequence parameters. It carries
the positions of the tokens (for the rotary embedding) and computes the attention itself, so that
training packs, prompts being prefilled and single tokens being decoded with a key/value cache go
through the same model.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Any, Sequence

import torch
import torch.nn.functional as F
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_rl.models.short_attention import LONGEST, ShortAttention, ShortBucket

#: A bucket holds sequences of at least this share of its longest one: at most a third of its work
#: is padding.
BUCKET_FILL = 0.67


@dataclass
class Placement(PackedSeqParams):
    """Where each token of a row of T tokens stands. Subclasses say what it attends to."""

    positions: torch.Tensor = field(kw_only=True)  #: int64 [T], position within its sequence
    padding: torch.Tensor | None = (
        None  #: bool [T], True on the padding of the row; None: there is none
    )
    #: int64 [T], how many tokens each stands for, 0 on padding; None: one each
    counts: torch.Tensor | None = None

    def attend(
        self,
        layer_number: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        """Causal attention within each sequence.

        Args:
            layer_number: which attention layer it is, as the model counts them; its own in the
                whole model.
            query: [T, heads, head_dim] of this rank.
            key, value: [T, groups, head_dim]; heads is a multiple of groups. Values may be of
                another width, which then is the output's.
            scale: factor on the scores.

        Returns:
            [T, heads, head_dim].
        """
        raise NotImplementedError


@dataclass
class PackedPlacement(Placement):
    """Several whole sequences one behind the other, then padding.

    Sequences of similar length are laid side by side as a batch [S, longest, ...] and go through
    one call of scaled_dot_product_attention; with the padding at their end the causal mask alone
    keeps them apart. A token of the row's padding is a sequence of one token.
    """

    bucket_shapes: tuple[
        tuple[int, int], ...
    ] = ()  #: (S_b, L_b): sequences and longest one of each bucket
    #: int64 [sum S_b * L_b], row of each bucket entry; padding repeats a valid one
    to_buckets: torch.Tensor = field(kw_only=True)
    #: int64 [T], where each token is in the flattened buckets
    from_buckets: torch.Tensor = field(kw_only=True)
    #: int32, 0 and the end of each sequence; the padding is a last one
    cumulative_lengths: torch.Tensor = field(kw_only=True)
    longest: int = 0  #: longest sequence, padding included
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
        sizes = [rows * length for rows, length in self.bucket_shapes]
        parts = [
            into_buckets(tensor, self.to_buckets, self.from_buckets).split(sizes)
            for tensor in (query, key, value)
        ]
        outputs = [
            causal_attention(
                q.unflatten(0, shape), k.unflatten(0, shape), v.unflatten(0, shape), scale
            ).flatten(0, 1)
            for shape, q, k, v in zip(self.bucket_shapes, *parts, strict=True)
        ]
        return out_of_buckets(torch.cat(outputs), self.from_buckets)


class _IntoBuckets(torch.autograd.Function):
    """Rows [T, ...] -> bucket entries. No gradient reaches the padding entries, so the way back is
    a plain gather.
    """

    @staticmethod
    def forward(
        ctx: Any, tensor: torch.Tensor, to_buckets: torch.Tensor, from_buckets: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(from_buckets)
        return tensor.index_select(0, to_buckets)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (from_buckets,) = ctx.saved_tensors
        return grad.index_select(0, from_buckets), None, None


class _OutOfBuckets(torch.autograd.Function):
    """Bucket entries -> rows [T, ...]; the gradient of padding entries is zero."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, from_buckets: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(from_buckets)
        ctx.num_entries = len(tensor)
        return tensor.index_select(0, from_buckets)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        (from_buckets,) = ctx.saved_tensors
        entries = grad.new_zeros(ctx.num_entries, *grad.shape[1:])
        return entries.index_copy_(0, from_buckets, grad), None


def into_buckets(tensor: torch.Tensor, entries: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Rows [T, ...] at ``entries`` [N] -> [N, ...], differentiable.

    ``places`` [T]: the one entry of each row that is no padding. No gradient may reach the others.
    """
    return _IntoBuckets.apply(tensor, entries, places)


def out_of_buckets(entries: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Entries [N, ...] at ``places`` [T] -> rows [T, ...], differentiable."""
    return _OutOfBuckets.apply(entries, places)


def packed_placement(
    lengths: Sequence[int],
    num_tokens: int,
    device: torch.device,
    kind: type[PackedPlacement] = PackedPlacement,
    **fields: Any,
) -> PackedPlacement:
    """The placement of a row of ``num_tokens`` tokens that begins with sequences of these lengths.

    ``kind`` and ``fields`` make a subclass of `PackedPlacement` with its own fields.
    """
    starts: list[int] = []
    positions: list[int] = []
    for length in lengths:
        starts.append(len(positions))
        positions.extend(range(length))
    padding = num_tokens - len(positions)
    if padding < 0:
        raise ValueError(f"sequences of {len(positions)} tokens do not fit a row of {num_tokens}")
    starts.extend(range(len(positions), num_tokens))
    positions.extend([0] * padding)
    shapes, to_buckets, from_buckets = _buckets([*lengths, *[1] * padding], starts)
    segments = [*lengths, padding] if padding else list(lengths)
    return kind(
        qkv_format="packed",
        positions=torch.tensor(positions, device=device),
        padding=torch.arange(num_tokens, device=device) >= num_tokens - padding,
        bucket_shapes=shapes,
        to_buckets=to_buckets.to(device),
        from_buckets=from_buckets.to(device),
        cumulative_lengths=torch.tensor([0, *itertools.accumulate(segments)], dtype=torch.int32).to(
            device
        ),
        longest=max(segments, default=0),
        short=_short(shapes, to_buckets, from_buckets)
        if torch.device(device).type == "cpu"
        else None,
        **fields,
    )


def _short(
    shapes: Sequence[tuple[int, int]], to_buckets: torch.Tensor, from_buckets: torch.Tensor
) -> ShortAttention | None:
    """The attention of buckets [S, L], each causal; None: they are too long for it."""
    if max((length for _, length in shapes), default=0) > LONGEST:
        return None
    buckets = [
        ShortBucket(rows, torch.ones(1, length, length, dtype=torch.bool).tril())
        for rows, length in shapes
    ]
    valid = torch.zeros(len(to_buckets), dtype=torch.bool)
    valid[from_buckets] = True
    return ShortAttention(buckets, to_buckets, from_buckets, to_buckets, valid)


def similar_lengths(lengths: Sequence[int]) -> list[list[int]]:
    """The sequences in groups of similar length, the longest group, and the longest of a group,
    first.
    """
    groups: list[list[int]] = []
    for s in sorted(range(len(lengths)), key=lambda s: -lengths[s]):
        if groups and lengths[s] >= BUCKET_FILL * lengths[groups[-1][0]]:
            groups[-1].append(s)
        else:
            groups.append([s])
    return groups


def _buckets(
    lengths: Sequence[int], starts: Sequence[int]
) -> tuple[tuple[tuple[int, int], ...], torch.Tensor, torch.Tensor]:
    """Sequences of similar length laid together: shapes of the buckets, the way in and the way
    back.
    """
    length_of, start_of = torch.tensor(lengths), torch.tensor(starts)
    back = torch.zeros(sum(lengths), dtype=torch.int64)
    shapes, entries, offset = [], [], 0
    for members in similar_lengths(lengths):
        rows, longest = torch.tensor(members), lengths[members[0]]
        column = torch.arange(longest)
        valid = column < length_of[rows, None]
        index = start_of[rows, None] + torch.minimum(column, length_of[rows, None] - 1)
        flat = offset + torch.arange(index.numel()).view_as(index)
        back[index[valid]] = flat[valid]
        shapes.append((len(members), longest))
        entries.append(index.flatten())
        offset += index.numel()
    return tuple(shapes), torch.cat(entries), back


def causal_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
) -> torch.Tensor:
    """[S, L, heads, d] x [S, L, groups, d] -> [S, L, heads, d], causal."""
    return dot_product_attention(
        query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), scale, is_causal=True
    ).transpose(1, 2)


def dot_product_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    *,
    is_causal: bool = False,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """torch's scaled_dot_product_attention on [S, heads, L, d] with [S, groups, L, d] keys and
    values.

    On a CPU bf16 is computed in fp32: torch's bf16 backward pass is four times slower there.
    """
    dtype = query.dtype
    if query.device.type == "cpu" and dtype == torch.bfloat16:
        query, key, value = query.float(), key.float(), value.float()
    output = F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        is_causal=is_causal,
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return output.to(dtype)


class PackedAttention(MegatronModule):
    """The core attention of the local layer spec: the placement gets queries, keys and values."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        *_: Any,
        softmax_scale: float | None = None,
        **__: Any,
    ) -> None:
        super().__init__(config=config)
        self.layer_number = layer_number
        self.softmax_scale = softmax_scale

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        attn_mask_type: Any = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: Placement | None = None,
    ) -> torch.Tensor:
        """[T, 1, heads, d] queries, [T, 1, groups, d] keys and values -> [T, 1, heads * d].

        Latent attention leaves the axis of length 1 out.
        """
        if not isinstance(packed_seq_params, Placement):
            raise ValueError("PackedAttention needs a Placement as packed_seq_params")
        scale = self.softmax_scale or query.shape[-1] ** -0.5
        query, key, value = (tensor.flatten(0, -3) for tensor in (query, key, value))
        output = packed_seq_params.attend(self.layer_number, query, key, value, scale)
        return output.flatten(1).unsqueeze(1)


class PositionalRotaryEmbedding(RotaryEmbedding):
    """Rotary embedding at the positions the placement gives, instead of 0..T-1.

    Megatron asks for a length and then for the embedding of that length; here the "length" is the
    tensor of positions.
    """

    def get_rotary_seq_len(  # noqa: D102
        self,
        inference_context: Any,
        transformer: Any,
        transformer_input: Any,
        config: Any,
        packed_seq_params: Any = None,
        **_: Any,
    ) -> torch.Tensor:
        return packed_seq_params.positions

    def forward(self, positions: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        """int64 [T] -> angles fp32 [T, 1, 1, rotary_dim]."""
        inv_freq = self.inv_freq.to(positions.device)
        angles = positions.float()[:, None] * inv_freq
        return torch.cat((angles, angles), dim=-1)[:, None, None, :]
