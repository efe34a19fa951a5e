"""The samples of a step that are written, and what the update saw of their tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from megatron_rl.parallel.groups import Groups
from megatron_rl.policy.batch import PackTensors
from megatron_rl.policy.token_values import TokenValues
from megatron_rl.records import Sample
from megatron_rl.rollout.collect import ScoredGroup, sample_row, shown_answers


class ShownSamples:
    """Rows of samples.jsonl for one step."""

    def __init__(self, groups: Sequence[ScoredGroup], limit: int) -> None:
        """groups: of this rank. limit: rows at most."""
        self._groups, self._shown = groups, shown_answers(groups, limit)
        self._by_token: dict[int, dict[str, Any]] = {}
        self._advantages: dict[int, float] = {}
        self.values: TokenValues | None = None  #: for `update`; None: no values are kept

    def watch(
        self,
        mini_batches: Sequence[Sequence[Sample]],
        packed: Sequence[Sequence[PackTensors]],
        tokens: int,
        device: torch.device,
    ) -> None:
        """Keep values of the first ``tokens`` tokens of each completion that is shown.

        mini_batches: of this rank: the groups' answers in order, cut into equal parts.
        packed: their packs.
        """
        self.values = TokenValues(device)
        size = len(mini_batches[0]) if mini_batches else 0
        firsts = np.cumsum([0, *(len(scored.group.completions) for scored in self._groups)])
        self._tokens = tokens
        for number, (samples, packs) in enumerate(zip(mini_batches, packed, strict=True)):
            wanted = {}
            for row, (group, answer) in enumerate(self._shown):
                flat = int(firsts[group]) + answer
                if flat // size == number:
                    prompt = len(self._groups[group].group.prompt.tokens)
                    wanted[row] = (flat % size, max(1, prompt))
                    self._advantages[row] = samples[flat % size].advantage
            self.values.watch(samples, packs, wanted)

    def gather(self, groups: Groups, piece: Callable[[int], str]) -> None:
        """Fetch the values after the last update. A collective. piece: the text of a token."""
        if self.values is None:
            return
        for row, (ratio, gamma) in self.values.gather(groups).items():
            group, answer = self._shown[row]
            completion = self._groups[group].group.completions[answer]
            ids = completion.tokens[len(completion.tokens) - len(ratio) :][: self._tokens]
            written = completion.written
            trained = np.ones(len(ids), bool) if written is None else written[-len(ratio) :]
            lists = {"ratio": ratio, "gamma": gamma}
            self._by_token[row] = {
                "text": [piece(int(token)) for token in ids],
                **{
                    name: [
                        float(f"{value:.4g}") if known else None
                        for value, known in zip(values[: len(ids)], trained)
                    ]
                    for name, values in lists.items()
                    if not np.isnan(values).all()
                },
            }

    def rows(self) -> list[dict[str, Any]]:
        """The rows, with ``advantage`` and ``by_token`` where values were kept."""
        rows = []
        for number, (group, answer) in enumerate(self._shown):
            row = sample_row(self._groups[group], answer)
            if number in self._by_token:
                row["advantage"] = self._advantages[number]
                row["by_token"] = self._by_token[number]
            rows.append(row)
        return rows
