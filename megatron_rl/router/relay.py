"""Carries each micro-batch's running distance from stage to stage, in rows behind its activations.

A stage joins its own layers' distances to the running value of the stages before, by the
`LayerRule` of the run. For the mean and the maximum that is one number: 4 bytes a token and
boundary, no gather of traces, no second forward pass. For a quantile it is every distance so far,
in room for those of all L layers: 4 L bytes. Megatron's schedules send it with the activations of
its micro-batch, in whole rows of them, and rows of zeros with their gradients: there is no message,
order or process group of its own.

Legend: T_local tokens of this rank's part of a row, D hidden size, R rows of the running value.
"""

from __future__ import annotations

from typing import Sequence

import torch

from megatron_rl.algorithms.layer_rules import LayerRule


class DistanceRelay:
    """The running distances of one rank's chunks."""

    def __init__(
        self,
        rule: LayerRule,
        layers_before: Sequence[int],
        *,
        num_layers: int,
        hidden_size: int,
        dtype: torch.dtype,
        is_first: bool,
        is_last: bool,
    ) -> None:
        """
        Args:
            rule: how the distances of the layers become one.
            layers_before: of each of this rank's chunks (virtual stages), the number of MoE layers
                in front of it.
            num_layers: MoE layers of the whole model.
            hidden_size: D.
            dtype: of activations between stages.
            is_first: this rank holds the first pipeline stage.
            is_last: this rank holds the last one.
        """
        self.rule = rule
        self._layers_before = tuple(layers_before)
        self._num_layers = num_layers
        self._row_bytes = hidden_size * dtype.itemsize
        self._is_first, self._is_last = is_first, is_last

    def rows_behind(self, num_tokens: int) -> int:
        """The rows [1, D] that the running value of T_local tokens takes between any two stages; 0
        where there is one stage.
        """
        if self._is_first and self._is_last:
            return 0
        return -(-4 * self.rule.rows(self._num_layers) * num_tokens // self._row_bytes)

    def is_first(self, chunk: int) -> bool:
        """Whether nothing comes before the chunk."""
        return self._is_first and chunk == 0

    def read(self, behind: torch.Tensor, chunk: int, num_tokens: int) -> torch.Tensor | None:
        """What `put` wrote into the rows that came ``behind`` a chunk's activations: the running
        value [R, T_local] of the layers before, None if there are none.
        """
        rows = self.rule.rows(self._layers_before[chunk])
        if not rows:
            return None
        flat = behind.detach().flatten()
        used = flat[: 4 * rows * num_tokens // flat.itemsize].clone()  # which is aligned
        return used.view(torch.float32).view(rows, num_tokens)

    def join(self, before: torch.Tensor | None, distances: torch.Tensor) -> torch.Tensor:
        """The running value behind a chunk: of what `read` gave and the distances of each MoE layer
        of the chunk, possibly none, [L_chunk, T_local].
        """
        running = self.rule.running(distances.float())
        return running if before is None else self.rule.join(before, running)

    def ends_at(self, chunk: int) -> bool:
        """Whether the chunk is the last of the model: its running value is that of all layers."""
        return self._is_last and chunk == len(self._layers_before) - 1

    def put(self, output: torch.Tensor, running: torch.Tensor) -> torch.Tensor:
        """A chunk's output [T_local, 1, D] with the running value behind it; no gradient flows
        through that.
        """
        num_tokens, _, hidden_size = output.shape
        values = running.detach().flatten().view(output.dtype)
        behind = output.new_zeros(self.rows_behind(num_tokens), 1, hidden_size)
        behind.view(-1)[: len(values)] = values
        return torch.cat([output, behind])
