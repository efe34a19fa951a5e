"""The key/value cache, and the attention placements that fill it and read it."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from megatron_rl.models.attention import PackedPlacement, Placement, dot_product_attention

#: A cache grows by this many positions at a time.
BLOCK = 64
#: Attention reads a multiple of this many positions: CUDA kernels want aligned masks.
ALIGNMENT = 8


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


class KVCache:
    """Keys and values of this rank's layers, [rows, groups, capacity, head_dim], one row for each
    sequence.

    Layers have Megatron's global layer numbers. A layer's tensors are made when it first writes, in
    its type. Positions never written are zero, because a masked position must be finite.
    """

    def __init__(self, rows: int, length: int) -> None:
        self.rows = rows
        self.capacity = _round_up(length, BLOCK)
        self.keys: dict[int, torch.Tensor] = {}
        self.values: dict[int, torch.Tensor] = {}

    def write(
        self,
        layer_number: int,
        rows: torch.Tensor,
        positions: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
    ) -> None:
        """Store ``key`` and ``value`` [n, groups, head_dim] at (rows [n], positions [n])."""
        for store, tensor in ((self.keys, key), (self.values, value)):
            if layer_number not in store:
                _, groups, head_dim = tensor.shape
                store[layer_number] = tensor.new_zeros(self.rows, groups, self.capacity, head_dim)
            store[layer_number][rows, :, positions] = tensor

    def reserve(self, length: int) -> None:
        """Make room for sequences of ``length`` tokens."""
        if length > self.capacity:
            self.capacity = _round_up(length, BLOCK)
            for store in (self.keys, self.values):
                for number, tensor in store.items():
                    grown = tensor.new_zeros(*tensor.shape[:2], self.capacity, tensor.shape[3])
                    grown[:, :, : tensor.shape[2]] = tensor
                    store[number] = grown

    def select(self, rows: torch.Tensor) -> KVCache:
        """A cache of ``rows`` int64 [n], in that order; a row may be repeated."""
        selected = KVCache(len(rows), self.capacity)
        selected.keys = {number: tensor[rows] for number, tensor in self.keys.items()}
        selected.values = {number: tensor[rows] for number, tensor in self.values.items()}
        return selected


@dataclass
class PrefillPlacement(PackedPlacement):
    """Packed prompts whose keys and values are stored while they attend. Padding is not stored."""

    cache: KVCache = field(kw_only=True)
    #: int64 [n], cache row of each token; n = T - padding
    rows: torch.Tensor = field(kw_only=True)

    def attend(  # noqa: D102
        self,
        layer_number: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        n = len(self.rows)
        self.cache.write(layer_number, self.rows, self.positions[:n], key[:n], value[:n])
        return super().attend(layer_number, query, key, value, scale)


@dataclass
class DecodePlacement(Placement):
    """One new token for each of the cache's R rows, then padding, whose attention output is zero.

    Token r is written at ``positions[r]`` and attends to positions 0..positions[r] of its row. The
    query heads that share a key/value group become a query length, so the cache is not repeated.
    """

    cache: KVCache = field(kw_only=True)
    rows: torch.Tensor = field(kw_only=True)  #: int64 [R], 0..R-1
    length: int = 0  #: cache positions read; a multiple of ALIGNMENT
    mask: torch.Tensor | None = None  #: bool [R, 1, 1, length], True: row r attends to it

    def attend(  # noqa: D102
        self,
        layer_number: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        num_rows, (num_tokens, heads, head_dim) = len(self.rows), query.shape
        groups = key.shape[1]
        positions = self.positions[:num_rows]
        self.cache.write(layer_number, self.rows, positions, key[:num_rows], value[:num_rows])
        output = dot_product_attention(
            query[:num_rows].reshape(num_rows, groups, heads // groups, head_dim),
            self.cache.keys[layer_number][:, :, : self.length],
            self.cache.values[layer_number][:, :, : self.length],
            scale,
            mask=self.mask,
        ).reshape(num_rows, heads, value.shape[-1])
        if num_tokens == num_rows:
            return output
        return torch.cat([output, output.new_zeros(num_tokens - num_rows, *output.shape[1:])])


def decode_placement(
    cache: KVCache, positions: torch.Tensor, longest: int, num_tokens: int
) -> DecodePlacement:
    """The placement of one decoding step.

    Args:
        cache: of R rows; it grows if the new tokens need room.
        positions: int64 [R], of each row's new token.
        longest: the largest position, known without asking the device.
        num_tokens: T >= R, length of the row of tokens.
    """
    cache.reserve(longest + 1)
    length = _round_up(longest + 1, ALIGNMENT)
    columns = torch.arange(length, device=positions.device)
    padding = positions.new_zeros(num_tokens - len(positions))
    return DecodePlacement(
        qkv_format="packed",
        positions=torch.cat([positions, padding]),
        cache=cache,
        rows=torch.arange(len(positions), device=positions.device),
        length=length,
        mask=(columns <= positions[:, None])[:, None, None],
    )
