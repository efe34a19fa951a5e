"""The attention of a layer on its normalised input: grouped-query, and multi-head latent.

Legend: T tokens, D hidden size, G key/value groups and H query heads of this rank, d width of a
head. The result is this rank's part of a sum over the tensor-parallel group.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.distributed import ProcessGroup

from megatron_rl.parallel.collectives import all_reduce
from megatron_rl.rollout.builtin.plain.cache import Place
from megatron_rl.rollout.builtin.plain.weights import GroupedAttention, LatentAttention


@dataclass(frozen=True)
class Heads:
    """Widths of the attention, and what it needs besides weights."""

    width: int  #: d of a query or key head
    rotated: int  #: its last columns, of latent attention those that are rotated; d otherwise
    value: int  #: width of a value head
    latent: int  #: width of a compressed vector; 0: no latent attention
    absorbed: bool  #: the cache of latent attention holds compressed vectors
    scale: float  #: factor on the scores
    epsilon: float  #: of norms
    tensor: ProcessGroup  #: norms over all heads are summed over it


def grouped(
    x: torch.Tensor, weights: GroupedAttention, place: Place, layer: int, heads: Heads
) -> torch.Tensor:
    """[T, D] -> [T, D]."""
    projected = F.linear(x, weights.qkv, weights.qkv_bias)
    num_groups = _groups(weights, heads)
    projected = projected.view(len(x), num_groups, -1, heads.width)  # [T, G, H / G + 2, d]
    pairs, value = projected[:, :, :-1], projected[:, :, -1]
    if weights.query_norm is not None and weights.key_norm is not None:
        pairs = _normalised(pairs, weights.query_norm, weights.key_norm, heads)
    pairs = rotated(pairs, place.cos[:, None], place.sin[:, None])
    query, key = pairs[:, :, :-1], pairs[:, :, -1]
    place.store(layer, key, value)
    output = place.attend(layer, query, key, value, heads.scale)
    return F.linear(output.reshape(len(x), -1), weights.out)


def cached(weights: GroupedAttention | LatentAttention, heads: Heads) -> tuple[int, int, int]:
    """What the cache holds of this layer: groups, and the widths of a key and of a value."""
    if isinstance(weights, GroupedAttention):
        return _groups(weights, heads), heads.width, heads.width
    if heads.absorbed:
        return 1, len(weights.latent_down), 0
    return weights.out.shape[1] // heads.value, heads.width, heads.value


def _groups(weights: GroupedAttention, heads: Heads) -> int:
    num_queries = weights.out.shape[1] // heads.width
    return (len(weights.qkv) // heads.width - num_queries) // 2


def rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of [..., d] (RoFormer, arXiv 2104.09864, eq. 34) in pairs (i, i + d / 2).

    ``cos`` and ``sin``: see `Place`; broadcast against x.
    """
    half = x.shape[-1] // 2
    return torch.addcmul(x * cos, x.roll(half, -1), sin)


def _normalised(
    pairs: torch.Tensor, query_norm: torch.Tensor, key_norm: torch.Tensor, heads: Heads
) -> torch.Tensor:
    """RMSNorm of queries and keys [T, G, H / G + 1, d]: of each head, or over all of all ranks."""
    if len(query_norm) == heads.width == len(key_norm):
        weight = torch.cat([query_norm.expand(pairs.shape[2] - 1, -1), key_norm[None]])
        return F.rms_norm(pairs, (heads.width,), None, heads.epsilon) * weight
    flat, num_queries = pairs.float(), pairs.shape[2] - 1
    squares = flat.square().sum((1, 3))  # [T, H / G + 1]
    squares = torch.stack([squares[:, :-1].sum(-1), squares[:, -1]])
    of_queries, of_keys = all_reduce(squares, heads.tensor)[..., None]
    of_queries = torch.rsqrt(of_queries / len(query_norm) + heads.epsilon)
    of_keys = torch.rsqrt(of_keys / len(key_norm) + heads.epsilon)
    factors = torch.cat([of_queries.expand(-1, num_queries), of_keys], dim=-1)
    own = [
        weight.chunk(heads.tensor.size())[heads.tensor.rank()].view(pairs.shape[1], -1, heads.width)
        for weight in (query_norm, key_norm)
    ]
    return (flat * factors[:, None, :, None]).to(pairs.dtype) * torch.cat(own, dim=1)


def latent(
    x: torch.Tensor, weights: LatentAttention, place: Place, layer: int, heads: Heads
) -> torch.Tensor:
    """[T, D] -> [T, D].

    Absorbed, the up-projections of keys and values are applied to queries and outputs while
    decoding (DeepSeek-V2, arXiv 2405.04434, section 2.1.2), so that the cache holds compressed
    vectors only. That rounds otherwise: three times as far from the scoring pass in fp32.
    """
    norm = lambda x, weight: F.rms_norm(x, weight.shape, weight, heads.epsilon)  # noqa: E731
    compressed = x
    if weights.query_down is not None and weights.query_norm is not None:
        compressed = norm(F.linear(x, weights.query_down), weights.query_norm)
    plain = heads.width - heads.rotated
    query = F.linear(compressed, weights.query).view(len(x), -1, heads.width)
    query_plain, query_turned = query.split([plain, heads.rotated], dim=-1)
    query_turned = rotated(_apart(query_turned), place.cos, place.sin)
    rank = len(weights.latent_norm)
    latents, turned = F.linear(x, weights.latent_down).split([rank, heads.rotated], dim=-1)
    latents = norm(latents, weights.latent_norm)
    turned = rotated(_apart(turned)[:, None], place.cos, place.sin)
    up = weights.latent_up.view(-1, plain + heads.value, rank)  # [H, nope + value, rank]
    if heads.absorbed:
        place.store(layer, torch.cat([latents[:, None], turned], dim=-1), latents[:, None, :0])
    if heads.absorbed and place.decoding:
        wide = torch.einsum("thn,hnr->thr", query_plain, up[:, :plain])
        wide = torch.cat([wide, query_turned], dim=-1)[:, None]
        output = place.attend(layer, wide, wide, wide, heads.scale)[:, 0]
        output = torch.einsum("thr,hvr->thv", output, up[:, plain:])
    else:
        both = F.linear(latents, weights.latent_up).view(len(x), -1, plain + heads.value)
        key, value = both.split([plain, heads.value], dim=-1)
        key = torch.cat([key, turned.expand(-1, key.shape[1], -1)], dim=-1)
        query = torch.cat([query_plain, query_turned], dim=-1)[:, :, None]
        if not heads.absorbed:
            place.store(layer, key, value)
        output = place.attend(layer, query, key, value, heads.scale)
    return F.linear(output.reshape(len(x), -1), weights.out)


def _apart(x: torch.Tensor) -> torch.Tensor:
    """Columns 0, 2, 4... and behind them 1, 3, 5...: DeepSeek rotates neighbours."""
    return x.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)
