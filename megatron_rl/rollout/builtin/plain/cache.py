"""A key/value cache of fixed strides, and the places of tokens that fill it and read it.

Legend: R rows, T tokens of a pass, G key/value groups and H query heads of this rank, d width of a
head, C positions of the cache.
"""

from __future__ import annotations

from typing import Callable, Protocol, Sequence

import torch

from megatron_rl.models.attention import PackedPlacement, dot_product_attention

#: int64 [T] -> cos and sin, see `Place`
Rotations = tuple[torch.Tensor, torch.Tensor]


class Cache:
    """Keys and values of this rank's layers, [R, G, C, d] each, zero where nothing was written.

    Latent attention keeps the compressed vector and the rotated part of the key behind it, one
    group for all heads. It has no values: they are the first columns of the keys.
    """

    def __init__(
        self,
        widths: Sequence[tuple[int, int, int]],
        rows: int,
        capacity: int,
        like: torch.Tensor,
    ) -> None:
        """
        Args:
            widths: of each layer the groups, and the widths of a key and of a value (0: none).
            rows, capacity: R and C.
            like: of the type and on the device of the cache.
        """
        self.rows, self.capacity = rows, capacity
        self.keys = [like.new_zeros(rows, groups, capacity, key) for groups, key, _ in widths]
        self.values = [like.new_zeros(rows, groups, capacity, value) for groups, _, value in widths]

    def grow(self, capacity: int) -> None:
        """Make room for ``capacity`` positions, in new tensors."""
        for store in (self.keys, self.values):
            for place, tensor in enumerate(store):
                grown = tensor.new_zeros(*tensor.shape[:2], capacity, tensor.shape[3])
                grown[:, :, : self.capacity] = tensor
                store[place] = grown
        self.capacity = capacity

    def move(self, sources: torch.Tensor, targets: torch.Tensor) -> None:
        """Copy rows ``sources`` int64 [n] over rows ``targets`` [n], which are others."""
        for tensor in (*self.keys, *self.values):
            tensor.index_copy_(0, targets, tensor.index_select(0, sources))


class Place(Protocol):
    """Where the T tokens of a pass stand."""

    decoding: bool  #: one token for each row of a cache
    cos: torch.Tensor  #: [T, 1, rotary width], of the angles of the tokens' positions
    sin: torch.Tensor  #: the same, with the first half negated

    def store(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """Keep keys and values [T, G, d] of layer number ``layer`` of this rank, from 0. Values may
        have no columns.
        """

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """Causal attention of [T, G, H / G, d] queries -> [T, G, H / G, width of a value].

        Keys and values are the tokens' own. While decoding those of the cache count: of keys
        that have no values the first columns, see `Decoding`.
        """


class Prefill:
    """Whole prompts, packed; rows of the cache get copies of them."""

    decoding = False

    def __init__(
        self,
        cache: Cache,
        placement: PackedPlacement,
        rotations: Rotations,
        rows: slice,
        sources: torch.Tensor,
    ) -> None:
        """
        Args:
            cache: to be filled.
            placement: of the T tokens.
            rotations: cos and sin of their positions.
            rows: R' rows of the cache that begin with these prompts.
            sources: int64 [R', longest], the token that stands at each position of these rows;
                any behind a prompt's end.
        """
        self.cos, self.sin = rotations
        self._cache, self._placement = cache, placement
        self._rows, self._sources = rows, sources

    def store(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:  # noqa: D102
        for tensor, store in ((key, self._cache.keys), (value, self._cache.values)):
            if tensor.shape[-1]:
                copies = tensor[self._sources].transpose(1, 2)
                store[layer][self._rows, :, : copies.shape[2]] = copies

    def attend(  # noqa: D102
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
    ) -> torch.Tensor:
        heads = query.flatten(1, 2)
        output = self._placement.attend(layer, heads, key, value, scale)
        return output.view(*query.shape[:3], value.shape[-1])


class Decoding:
    """One new token for each of the first R rows of the cache, which attends to its row up to
    itself. Nothing here waits for the device.
    """

    decoding = True

    def __init__(
        self,
        cache: Cache,
        positions: torch.Tensor,
        rotations: Rotations,
        parts: Sequence[tuple[slice, int]],
        value_width: int,
    ) -> None:
        """
        Args:
            cache: of R rows or more.
            positions: int64 [R], of the new tokens.
            rotations: cos and sin of these positions.
            parts: consecutive rows, and how many positions of the cache are read of them: above all
                of theirs.
            value_width: columns of a key that are its value, where the cache has no values; 0: no
                latent attention.
        """
        self.cos, self.sin = rotations
        self._cache, self._value_width = cache, value_width
        groups = cache.keys[0].shape[1]
        columns = torch.arange(max(length for _, length in parts), device=positions.device)
        mask = (columns <= positions[:, None])[:, None, None]
        self._attention: Callable[..., torch.Tensor] = dot_product_attention
        if cache.keys[0].dtype == torch.float32 and not value_width:
            # What is added to the scores. Latent attention would be 1.5e-5 from the scoring pass.
            self._attention = _products
            mask = torch.zeros_like(mask, dtype=torch.float32).masked_fill_(~mask, float("-inf"))
            mask = mask.expand(-1, groups, -1, -1)
        self._parts = [(rows, length, mask[rows, ..., :length]) for rows, length in parts]
        if self._attention is _products:  # its two first dimensions in one, copied once a step
            self._parts = [(rows, length, mask.flatten(0, 1)) for rows, length, mask in self._parts]
        pairs = torch.arange(len(positions) * groups, device=positions.device).view(-1, groups)
        self._index = (pairs * cache.capacity + positions[:, None]).flatten()

    def store(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:  # noqa: D102
        for tensor, store in ((key, self._cache.keys), (value, self._cache.values)):
            width = tensor.shape[-1]
            if width:
                flat = store[layer].view(-1, width)
                flat.index_copy_(0, self._index, tensor.reshape(-1, width))

    def attend(  # noqa: D102
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
    ) -> torch.Tensor:
        keys, values = self._cache.keys[layer], self._cache.values[layer]
        if not values.shape[-1]:
            values = keys[..., : self._value_width]
        outputs = [
            self._attention(
                query[rows], keys[rows, :, :length], values[rows, :, :length], scale, mask=mask
            )
            for rows, length, mask in self._parts
        ]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def _products(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scale: float,
    mask: torch.Tensor,
) -> torch.Tensor:
    """`dot_product_attention` in fp32 as two batched products: faster on a CPU for one new token
    of each row. ``mask``: fp32 [R G, 1, L], 0 or -inf.
    """
    scores = torch.baddbmm(mask, query.flatten(0, 1), keys.flatten(0, 1).mT, alpha=scale)
    shares = scores.sub_(scores.amax(-1, keepdim=True)).exp_()
    output = torch.bmm(shares, values.flatten(0, 1)).div_(shares.sum(-1, keepdim=True))
    return output.view(*query.shape[:3], -1)
