"""A pass of tokens through this rank's part of the model, as plain functions over its weights.

Legend: T tokens, D hidden size, V rows of the vocabulary of the whole model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F

from megatron_rl.parallel.collectives import gather_first_dim
from megatron_rl.parallel.groups import Groups
from megatron_rl.rollout.builtin.plain.attention import Heads, cached, grouped, latent
from megatron_rl.rollout.builtin.plain.cache import Place, Rotations
from megatron_rl.rollout.builtin.plain.experts import Routing, mixture, swiglu
from megatron_rl.rollout.builtin.plain.weights import (
    ChunkWeights,
    Dense,
    GroupedAttention,
    Layer,
)


@dataclass(frozen=True)
class PlainModel:
    """This rank's part of the model."""

    chunks: tuple[ChunkWeights, ...]
    heads: Heads
    routing: Routing | None  #: None: no layer has experts
    hidden_size: int
    vocab_size: int  #: of the whole model, without padding
    dtype: torch.dtype  #: of activations
    angles: Rotations  #: cos and sin of every position, see `cache.Place`
    groups: Groups

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.angles[0].device

    def widths(self) -> list[tuple[int, int, int]]:
        """What a cache holds of each layer, see `attention.cached`."""
        return [
            cached(layer.attention, self.heads) for chunk in self.chunks for layer in chunk.layers
        ]

    def rotations(self, positions: torch.Tensor) -> Rotations:
        """cos and sin of int64 [T] positions, [T, 1, rotary width]."""
        cos, sin = self.angles
        return cos[positions][:, None], sin[positions][:, None]

    def forward(
        self, tokens: torch.Tensor, place: Place, last: torch.Tensor | None = None
    ) -> tuple[torch.Tensor | None, list[torch.Tensor]]:
        """One pass through all pipeline stages.

        Args:
            tokens: int64 [T], the same on all ranks of the model.
            place: where they stand.
            last: int64 [n], the tokens whose logits are wanted; None: all.

        Returns:
            Logits [n, V] on the last pipeline stage, None on the others; and the experts of the
            tokens, int64 [T, K] of each MoE layer of this rank.
        """
        pipeline = self.groups.pipeline
        stage, stages = pipeline.rank(), pipeline.size()
        ids: list[torch.Tensor] = []
        logits, first = None, 0
        for number, chunk in enumerate(self.chunks):
            if chunk.embedding is not None and stage == 0 and number == 0:
                hidden = self._embedded(tokens, chunk.embedding)
            else:
                hidden = torch.empty(
                    len(tokens), self.hidden_size, dtype=self.dtype, device=tokens.device
                )
                source = dist.get_global_rank(pipeline, (stage - 1) % stages)
                dist.recv(hidden, src=source, group=pipeline)
            for place_of_layer, layer in enumerate(chunk.layers, start=first):
                hidden = self._layer(hidden, layer, place, place_of_layer, ids)
            first += len(chunk.layers)
            if stage == stages - 1 and number == len(self.chunks) - 1:
                logits = self._logits(hidden if last is None else hidden[last], chunk)
            else:
                target = dist.get_global_rank(pipeline, (stage + 1) % stages)
                dist.send(hidden, dst=target, group=pipeline)
        return logits, ids

    def _layer(
        self, x: torch.Tensor, layer: Layer, place: Place, number: int, ids: list[torch.Tensor]
    ) -> torch.Tensor:
        """A transformer layer: [T, D] -> [T, D]; appends the experts of the tokens to ``ids``."""
        inside = self._normalised(x, layer.attention_norm)
        if isinstance(layer.attention, GroupedAttention):
            attended = grouped(inside, layer.attention, place, number, self.heads)
        else:
            attended = latent(inside, layer.attention, place, number, self.heads)
        x = x + self._summed(attended)
        inside = self._normalised(x, layer.mlp_norm)
        if isinstance(layer.feed_forward, Dense):
            return x + self._summed(swiglu(inside, layer.feed_forward))
        assert self.routing is not None, "the model has experts"
        output, chosen = mixture(inside, layer.feed_forward, self.routing)
        ids.append(chosen)
        return x + self._summed(output)

    def _normalised(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, (self.hidden_size,), weight, self.heads.epsilon)

    def _summed(self, part: torch.Tensor) -> torch.Tensor:
        """The sum over the tensor-parallel ranks; may be in place."""
        if self.groups.tensor.size() > 1:
            part = part.contiguous()
            dist.all_reduce(part, group=self.groups.tensor)
        return part

    def _embedded(self, tokens: torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:
        if self.groups.tensor.size() == 1:
            return F.embedding(tokens, embedding)
        local = tokens - self.groups.tensor.rank() * len(embedding)
        elsewhere = (local < 0) | (local >= len(embedding))
        rows = F.embedding(local.masked_fill(elsewhere, 0), embedding)
        return self._summed(rows.masked_fill(elsewhere[:, None], 0.0))

    def _logits(self, x: torch.Tensor, chunk: ChunkWeights) -> torch.Tensor:
        assert chunk.final_norm is not None and chunk.head is not None, "the last chunk"
        local = F.linear(self._normalised(x, chunk.final_norm), chunk.head)
        if self.groups.tensor.size() == 1:
            return local[:, : self.vocab_size]
        return gather_first_dim(local.T, self.groups.tensor).T[:, : self.vocab_size]


def angles_of(
    rotary: torch.nn.Module, length: int, dtype: torch.dtype, device: torch.device
) -> Rotations:
    """cos and sin of the positions 0..length-1, [length, rotary width], as `Place` wants them.

    ``rotary``: the model's own; gives the angles of positions, and with YaRN a factor.
    """
    found = rotary(torch.arange(length, device=device))
    angles, factor = found if isinstance(found, tuple) else (found, 1.0)
    angles = angles.flatten(0, -2)
    cos, sin = (angles.cos() * factor).to(dtype), (angles.sin() * factor).to(dtype)
    half = sin.shape[-1] // 2
    return cos, torch.cat([-sin[:, :half], sin[:, half:]], dim=-1)
