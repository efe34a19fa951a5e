"""A cursor over several data sets at once, each with its share of the draws."""

from __future__ import annotations

from typing import Any, Generic, Mapping, Sequence

from megatron_rl.data.prompts import DataPart, Item, PromptSource
from megatron_rl.errors import UserError


def source_of(
    items: Sequence[Item], parts: Sequence[DataPart], seed: int, shuffle: bool
) -> PromptSource[Item] | MixedSource[Item]:
    """The cursor over the items of a split; ``parts``: its data sets; fewer than two: no
    mixture.
    """
    if len(parts) < 2:
        return PromptSource(items, seed, shuffle)
    return MixedSource(items, parts, seed, shuffle)


class MixedSource(Generic[Item]):
    """An endless, resumable cursor over several data sets, the same on every rank.

    The n-th draw takes the data set that is furthest behind its share, so any n draws in a row
    match the weights to within about one item. Within a data set the order is that of
    `PromptSource`: an epoch draws each item once, and a small data set has more epochs.
    """

    def __init__(
        self, items: Sequence[Item], parts: Sequence[DataPart], seed: int, shuffle: bool
    ) -> None:
        self._labels = [part.label for part in parts]
        self._weights = [part.weight for part in parts]
        self._drawn = [0] * len(parts)
        self._sources: list[PromptSource[Item]] = []
        start = 0
        for number, part in enumerate(parts):
            mine = items[start : start + part.size]
            self._sources.append(PromptSource(mine, seed, shuffle, part=number))
            start += part.size

    def next_batch(self, n: int) -> list[Item]:
        """The next n items."""
        return [self._sources[self._next_part()].next_batch(1)[0] for _ in range(n)]

    def _next_part(self) -> int:
        total, whole = sum(self._drawn) + 1, sum(self._weights)
        behind = [
            total * weight / whole - drawn for weight, drawn in zip(self._weights, self._drawn)
        ]
        part = behind.index(max(behind))
        self._drawn[part] += 1
        return part

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers, fit for JSON."""
        return {
            "labels": self._labels,
            "weights": self._weights,
            "drawn": list(self._drawn),
            "parts": [source.state_dict() for source in self._sources],
        }

    def load_state_dict(self, state: Mapping[str, Any], *, other_data: bool = False) -> None:
        """Continues where ``state`` was taken. New weights count from here on. ``other_data``: as
        for `PromptSource`, part by part; with other parts, or the state of a single data set, all
        begin anew.

        ``UserError`` on another seed or order, or without ``other_data`` on other parts.
        """
        parts = state.get("parts")
        if parts is None or len(parts) != len(self._sources):
            if not other_data:
                raise UserError(
                    f"checkpoint of {1 if parts is None else len(parts)} data sets in data.train, "
                    f"here {len(self._sources)}; resuming expects the same data; restore "
                    "data.train, or start a new run with checkpoint.init_from"
                )
            self._drawn = [0] * len(self._sources)
            return
        for source, one in zip(self._sources, parts):
            source.load_state_dict(one, other_data=other_data)
        same = state["weights"] == self._weights
        self._drawn = list(state["drawn"]) if same else [0] * len(self._sources)
