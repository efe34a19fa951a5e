"""A record of the experts that the tokens of a batch go to while it is generated."""

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
    """The experts of the MoE layers of this pipeline stage, for all tokens: tensor-parallel ranks
    hold parts of the row, and gather them here.

    Legend: L' MoE layers of this rank, K experts of a token.
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
            chunks: this rank's chunks of the model.
            groups: process groups.
            capture: of the chunks' routers.
            shape: answers of the batch, and the most tokens of an answer.
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
        """Run `forward_stages` on packed prompts of these lengths, and record their experts."""
        output, routes = self._forward(tokens, placement)
        self._prompts += routes[: sum(lengths)].split(list(lengths))
        return output

    def decode(
        self, tokens: torch.Tensor, placement: Placement, rows: torch.Tensor, step: int
    ) -> torch.Tensor | None:
        """Run `forward_stages` on token number ``step`` of the answers ``rows`` (int64 [R]) and on
        padding behind them, and record the experts.
        """
        output, routes = self._forward(tokens, placement)
        self._answers[rows, step] = routes[: len(rows)]
        return output

    def take(self, prompt_of: Sequence[int], lengths: Sequence[int]) -> list[RoutedExperts]:
        """The experts of each prompt and answer: P + N - 1 tokens, since the last token was not fed
        to the model.

        Args:
            prompt_of: the number of each answer's prompt.
            lengths: the length N of each answer.
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
        """The output of the pass, and the experts [T, L', K] of every token of the row."""
        with self._capture.record_routes() as routes:
            output = forward_stages(self._chunks, tokens, placement, self._groups)
        if not self._layers:
            return output, self._answers.new_zeros(len(tokens), 0, self._top_k)
        local = torch.stack([routes[layer] for layer in self._layers], dim=1)
        # Sent as bytes, because neither gloo nor NCCL sends 16-bit integers.
        whole = gather_first_dim(local.view(torch.uint8), self._groups.tensor)
        return output, whole.view(self._type)
