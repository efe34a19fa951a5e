"""A pass of tokens through this rank's part of the model, as plain functions over its weights.

Legend: T tokens, D hidden size, V rows of the vocabulary of the whole model.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F

from megatron_rl.parallel.collectives import gather_first_dim
from megatron_rl.parallel.groups import Groups
from megatron_rl.rollout.builtin.plain.attention import Heads, cached, grouped, latent
from megatron_rl.rollout.builtin.plain.cache import Place, Rotations
from megatron_rl.rollout.builtin.plain.experts import Chosen, Routing, mixture, swiglu
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
    fp32_head: bool  #: the output layer multiplies in fp32
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
        self,
        tokens: torch.Tensor,
        place: Place,
        last: torch.Tensor | None = None,
        *,
        all_ids: bool = True,
        keep_logits: bool = False,
    ) -> tuple[torch.Tensor | None, list[Chosen]]:
        """One pass through all pipeline stages.

        Args:
            tokens: int64 [T], the same on all ranks of the model.
            place: where they stand.
            last: int64 [n], the tokens whose logits are wanted; None: all.
            all_ids: False: the last layer's router may choose for ``last`` only.
            keep_logits: the routers' logits are wanted too.

        Returns:
            Logits [n, V] on the last pipeline stage, None on the others; and what each router of
            this rank chose for the tokens.
        """
        stages = self.groups.pipeline.size() * len(self.chunks)
        chosen: list[Chosen] = []
        logits, layers_before = None, 0
        for number, chunk in enumerate(self.chunks):
            stage = self.groups.pipeline.rank() + number * self.groups.pipeline.size()
            if stage == 0:
                assert chunk.words is not None, "the first chunk"
                hidden = self._embedded(tokens, chunk.words)
            else:
                hidden = self._received(len(tokens))
            is_last = stage == stages - 1
            # Of the last layer only keys and values are wanted of the other tokens.
            early = last if is_last and chunk.layers else None
            for place_in_rank, layer in enumerate(chunk.layers, start=layers_before):
                keep = early if layer is chunk.layers[-1] else None
                hidden = self._layer(hidden, layer, place, place_in_rank, chosen, keep, all_ids)
                if chosen and not keep_logits:
                    chosen[-1] = Chosen(chosen[-1].ids, None)
            layers_before += len(chunk.layers)
            if is_last:
                select = last is not None and early is None
                logits = self._logits(hidden[last] if select else hidden, chunk)
            else:
                self._send(hidden)
        return logits, chosen

    def _received(self, num_tokens: int) -> torch.Tensor:
        pipeline = self.groups.pipeline
        hidden = torch.empty(num_tokens, self.hidden_size, dtype=self.dtype, device=self.device)
        source = (pipeline.rank() - 1) % pipeline.size()
        dist.recv(hidden, src=dist.get_global_rank(pipeline, source), group=pipeline)
        return hidden

    def _send(self, hidden: torch.Tensor) -> None:
        pipeline = self.groups.pipeline
        target = (pipeline.rank() + 1) % pipeline.size()
        dist.send(hidden, dst=dist.get_global_rank(pipeline, target), group=pipeline)

    def _layer(
        self,
        x: torch.Tensor,
        layer: Layer,
        place: Place,
        number: int,
        choices: list[Chosen],
        keep: torch.Tensor | None,
        all_ids: bool,
    ) -> torch.Tensor:
        """A transformer layer, number ``number`` of this rank: [T, D] -> [T, D], or of the tokens
        ``keep`` only. Appends what their router chose to ``choices``, with ``all_ids`` for all T.
        """
        inside = self._normalised(x, layer.attention_norm)
        if isinstance(layer.attention, GroupedAttention):
            attended = grouped(inside, layer.attention, place, number, self.heads)
        else:
            attended = latent(inside, layer.attention, place, number, self.heads)
        x = x + self._summed(attended)
        kept = x if keep is None else x[keep]
        if isinstance(layer.feed_forward, Dense):
            inside = self._normalised(kept, layer.mlp_norm)
            return kept + self._summed(swiglu(inside, layer.feed_forward))
        assert self.routing is not None, "the model has experts"
        routed, keep = (x, keep) if all_ids else (kept, None)
        inside = self._normalised(routed, layer.mlp_norm)
        output, chosen = mixture(inside, layer.feed_forward, self.routing, keep)
        choices.append(chosen)
        return kept + self._summed(output)

    def _normalised(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, (self.hidden_size,), weight, self.heads.epsilon)

    def _summed(self, part: torch.Tensor) -> torch.Tensor:
        """The sum over the tensor-parallel ranks; may be in place."""
        if self.groups.tensor.size() > 1:
            part = part.contiguous()
            dist.all_reduce(part, group=self.groups.tensor)
        return part

    def _embedded(self, tokens: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
        if self.groups.tensor.size() == 1:
            return words.index_select(0, tokens)
        local = tokens - self.groups.tensor.rank() * len(words)
        elsewhere = (local < 0) | (local >= len(words))
        rows = words.index_select(0, local.masked_fill(elsewhere, 0))
        return self._summed(rows.masked_fill(elsewhere[:, None], 0.0))

    def _logits(self, x: torch.Tensor, chunk: ChunkWeights) -> torch.Tensor:
        assert chunk.final_norm is not None and chunk.head is not None, "the last chunk"
        x, head = self._normalised(x, chunk.final_norm), chunk.head
        local = F.linear(x.float(), head.float()) if self.fp32_head else F.linear(x, head)
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
