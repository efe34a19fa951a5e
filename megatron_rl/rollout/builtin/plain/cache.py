"""A key/value cache whose rows lie in parts, and the places of tokens that fill it and read it.

Legend: R rows, T tokens of a pass, G key/value groups and H query heads of this rank, d width of a
head, C positions of the cache.
"""

from __future__ import annotations

from typing import Callable, Protocol, Sequence

import numpy as np
import torch

from megatron_rl.models.attention import PackedPlacement, dot_product_attention

#: int64 [T] -> cos and sin, see `Place`
Rotations = tuple[torch.Tensor, torch.Tensor]
#: consecutive rows, and of each part a number of positions
Parts = Sequence[tuple[slice, int]]


class Cache:
    """Keys and values of this rank's layers, zero where nothing was written.

    Rows lie in parts, each a tensor [R', G, C, d] of its own for every layer, and a step reads the
    first positions of every row. On a CPU that takes longer where C is more than these: the rest is
    a gap between what is read. Where rows are wanted otherwise they are laid out anew.

    Latent attention keeps the compressed vector and the rotated part of the key behind it, one
    group for all heads. It has no values: they are the first columns of the keys.
    """

    def __init__(
        self, widths: Sequence[tuple[int, int, int]], parts: Parts, like: torch.Tensor
    ) -> None:
        """
        Args:
            widths: of each layer the groups, and the widths of a key and of a value (0: none).
            parts: rows, one part behind the other, and their C.
            like: of the type and on the device of the cache.
        """
        self.parts = list(parts)
        make = lambda groups, width: [  # noqa: E731
            like.new_zeros(rows.stop - rows.start, groups, capacity, width)
            for rows, capacity in parts
        ]
        #: of each layer, of each part
        self.keys = [make(groups, key) for groups, key, _ in widths]
        self.values = [make(groups, value) for groups, _, value in widths]

    def holds(self, parts: Parts) -> bool:
        """Whether these are its parts, with as many positions or more."""
        return [rows for rows, _ in parts] == [rows for rows, _ in self.parts] and all(
            length <= capacity for (_, length), (_, capacity) in zip(parts, self.parts)
        )

    def lay_out(self, parts: Parts, sources: np.ndarray | None = None) -> None:
        """Take other parts, in new tensors where they differ.

        Args:
            parts: with room for all that was written to their rows.
            sources: int64 [R], of each row the one that it was; None: the same.
        """
        rows_before = np.arange(parts[-1][0].stop) if sources is None else sources
        plans = [
            [
                (old, self._index(places), self._index(numbers))
                for old, (old_rows, _) in enumerate(self.parts)
                for places, numbers in [_common(rows_before[rows], old_rows)]
                if len(places)
            ]
            for rows, _ in parts
        ]
        same = [
            sources is None and number < len(self.parts) and part == self.parts[number]
            for number, part in enumerate(parts)
        ]
        for stores in (self.keys, self.values):
            for layer, before in enumerate(stores):
                stores[layer] = [
                    before[number] if same[number] else _copied(before, part, plans[number])
                    for number, part in enumerate(parts)
                ]
        self.parts = list(parts)

    def _index(self, numbers: np.ndarray) -> slice | torch.Tensor:
        """A slice where they are consecutive, which copies nothing."""
        if (np.diff(numbers) == 1).all() and len(numbers):
            return slice(int(numbers[0]), int(numbers[-1]) + 1)
        return torch.from_numpy(numbers).to(self.keys[0][0].device)


def _copied(
    before: list[torch.Tensor],
    part: tuple[slice, int],
    plan: list[tuple[int, slice | torch.Tensor, slice | torch.Tensor]],
) -> torch.Tensor:
    """A part made of rows of others: of which one, to which rows, from which rows."""
    rows, capacity = part
    _, groups, _, width = before[0].shape
    made = before[0].new_empty(rows.stop - rows.start, groups, capacity, width)
    for old, to_rows, from_rows in plan:
        both = min(capacity, before[old].shape[2])
        made[to_rows, :, :both] = before[old][from_rows, :, :both]
        made[to_rows, :, both:] = 0
    return made


def _common(sources: np.ndarray, rows: slice) -> tuple[np.ndarray, np.ndarray]:
    """Which of ``sources`` are of these rows, int64 [n], and their numbers among the rows [n]."""
    places = np.flatnonzero((rows.start <= sources) & (sources < rows.stop))
    return places, sources[places] - rows.start


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
        first, end = self._rows.start, self._rows.stop
        for tensor, stores in ((key, self._cache.keys), (value, self._cache.values)):
            if not tensor.shape[-1]:
                continue
            for (rows, capacity), part in zip(self._cache.parts, stores[layer]):
                begin, until = max(rows.start, first), min(rows.stop, end)
                if begin < until:
                    sources = self._sources[begin - first : until - first, :capacity]
                    copies = tensor[sources].transpose(1, 2)
                    part[begin - rows.start : until - rows.start, :, : copies.shape[2]] = copies

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
        parts: Parts,
        value_width: int,
    ) -> None:
        """
        Args:
            cache: of R rows or more.
            positions: int64 [R], of the new tokens.
            rotations: cos and sin of these positions.
            parts: those of the cache, and how many positions are read of them: above all of theirs.
            value_width: columns of a key that are its value, where the cache has no values; 0: no
                latent attention.
        """
        self.cos, self.sin = rotations
        self._cache, self._value_width = cache, value_width
        assert cache.holds(parts), "the cache is laid out for them"
        groups = cache.keys[0][0].shape[1]
        columns = torch.arange(max(length for _, length in parts), device=positions.device)
        mask = (columns <= positions[:, None])[:, None, None]
        self._attention: Callable[..., torch.Tensor] = dot_product_attention
        if cache.keys[0][0].dtype == torch.float32 and not value_width:
            # What is added to the scores. Latent attention would be 1.5e-5 from the scoring pass.
            self._attention = _products
            mask = torch.zeros_like(mask, dtype=torch.float32).masked_fill_(~mask, float("-inf"))
            mask = mask.expand(-1, groups, -1, -1)
        self._parts = [(rows, length, mask[rows, ..., :length]) for rows, length in parts]
        if self._attention is _products:  # its two first dimensions in one, copied once a step
            self._parts = [(rows, length, mask.flatten(0, 1)) for rows, length, mask in self._parts]
        self._cells = []  # of the new tokens, in each part
        for rows, capacity in cache.parts:
            count = (rows.stop - rows.start) * groups
            first = torch.arange(0, count * capacity, capacity, device=positions.device)
            self._cells.append((first.view(-1, groups) + positions[rows, None]).flatten())

    def store(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:  # noqa: D102
        for tensor, stores in ((key, self._cache.keys), (value, self._cache.values)):
            width = tensor.shape[-1]
            if not width:
                continue
            for (rows, *_), part, cells in zip(self._parts, stores[layer], self._cells):
                part.view(-1, width).index_copy_(0, cells, tensor[rows].reshape(-1, width))

    def attend(  # noqa: D102
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
    ) -> torch.Tensor:
        keys, values = self._cache.keys[layer], self._cache.values[layer]
        if not values[0].shape[-1]:
            values = [part[..., : self._value_width] for part in keys]
        outputs = [
            self._attention(
                query[rows], keys[n][:, :, :length], values[n][:, :, :length], scale, mask=mask
            )
            for n, (rows, length, mask) in enumerate(self._parts)
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
