"""Which experts the tokens of a wave went to, while it is generated."""

from __future__ import annotations

from typing import Sequence

import numpy as np
import torch
from megatron.core.transformer.module import MegatronModule

from megatron_rl.models.attention import Placement
from megatron_rl.models.forward import forward_stages
from megatron_rl.parallel.collectives import gather_first_dim
from megatron_rl.parallel.groups import Groups
from megatron_rl.records import RoutedExperts
from megatron_rl.router.capture import RouterCapture
from megatron_rl.router.trace import id_dtype


class RouteLog:
    """The experts of this pipeline stage's layers, of whole tokens: those of the tensor-parallel
    ranks are put together. Legend: L' MoE layers of this rank, K experts a token.
    """

    def __init__(
        self,
        chunks: Sequence[MegatronModule],
        groups: Groups,
        capture: RouterCapture,
        shape: tuple[int, int],
    ) -> None:
        """
        Args:
            capture: bound to the chunks.
            shape: answers of the wave, and the most tokens of one.
        """
        config = chunks[0].config
        self._chunks, self._groups, self._capture = chunks, groups, capture
        self._layers, self._top_k = capture.layers_of(), config.moe_router_topk
        self._type = id_dtype(config.num_moe_experts)
        self._prompts: list[torch.Tensor] = []
        self._answers = torch.zeros(
            *shape,
            len(self._layers),
            self._top_k,
            dtype=self._type,
            device=next(chunks[0].parameters()).device,
        )

    def prefill(
        self, tokens: torch.Tensor, placement: Placement, lengths: Sequence[int]
    ) -> torch.Tensor | None:
        """`forward_stages` of packed prompts of these lengths."""
        output, routes = self._forward(tokens, placement)
        self._prompts += routes[: sum(lengths)].split(list(lengths))
        return output

    def decode(
        self, tokens: torch.Tensor, placement: Placement, rows: torch.Tensor, step: int
    ) -> torch.Tensor | None:
        """`forward_stages` of token number ``step`` of these answers (int64 [R]), then padding."""
        output, routes = self._forward(tokens, placement)
        self._answers[rows, step] = routes[: len(rows)]
        return output

    def take(self, prompt_of: Sequence[int], lengths: Sequence[int]) -> list[RoutedExperts]:
        """Of every answer with its prompt, P + N - 1 tokens: the last one was not fed to the
        model. ``lengths``: N of the answers.
        """
        prompts = [prompt.cpu().numpy() for prompt in self._prompts]
        answers = self._answers.cpu().numpy()
        return [
            RoutedExperts(np.concatenate([prompts[p], answers[row, : n - 1]]), self._layers)
            for row, (p, n) in enumerate(zip(prompt_of, lengths, strict=True))
        ]

    def _forward(
        self, tokens: torch.Tensor, placement: Placement
    ) -> tuple[torch.Tensor | None, torch.Tensor]:
        """The output, and the experts of every token of the row, [T, L', K]."""
        with self._capture.record_routes() as routes:
            output = forward_stages(self._chunks, tokens, placement, self._groups)
        if not self._layers:
            return output, self._answers.new_zeros(len(tokens), 0, self._top_k)
        local = torch.stack([routes[layer] for layer in self._layers], dim=1)
        # As bytes: neither gloo nor NCCL sends integers of 16 bits.
        whole = gather_first_dim(local.view(torch.uint8), self._groups.tensor)
        return output, whole.view(self._type)
