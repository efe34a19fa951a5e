"""A record of the experts that the tokens of a batch go to while it is generated."""

from __future__ import annotations

from typing import Sequence

import numpy as np
import torch
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_rl.models.attention import Placement
from megatron_rl.models.forward import forward_stages
from megatron_rl.parallel.collectives import gather_first_dim
from megatron_rl.parallel.groups import Groups
from megatron_rl.records import RoutedExperts
from megatron_rl.router.capture import RouterCapture
from megatron_rl.router.trace import id_dtype


class Routes:
    """The experts of the MoE layers of this rank, for all tokens.

    Legend: L' MoE layers of this rank, K experts of a token, R answers, N longest answer.
    """

    def __init__(
        self, layers: Sequence[int], config: TransformerConfig, shape: tuple[int, int],
        device: torch.device,
    ) -> None:  # fmt: skip
        """
        Args:
            layers: numbers of the MoE layers, ascending.
            config: of the model.
            shape: (R, N).
            device: of the model.
        """
        self._layers, self._top_k = tuple(layers), config.moe_router_topk
        self.type = id_dtype(config.num_moe_experts or 1)
        self._prompts: list[torch.Tensor] = []
        # A last row takes the experts of places that hold no answer.
        self._answers = torch.zeros(
            shape[0] + 1, shape[1], len(layers), self._top_k, dtype=self.type, device=device
        )

    def add_prompts(self, ids: Sequence[torch.Tensor], lengths: Sequence[int]) -> None:
        """Record experts [T, K] of each layer for packed prompts of these lengths."""
        self._prompts += self._stacked(ids, sum(lengths)).split(list(lengths))

    def add_answers(
        self, ids: Sequence[torch.Tensor], rows: torch.Tensor, step: int | torch.Tensor
    ) -> None:
        """Record experts [R', K] of each layer for token number ``step`` (also int64 0-d) of the
        answers ``rows`` int64 [R'], R for none.
        """
        flat = self._answers.view(-1, len(self._layers), self._top_k)
        flat.index_copy_(0, rows * self._answers.shape[1] + step, self._stacked(ids, len(rows)))

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

    def _stacked(self, ids: Sequence[torch.Tensor], num_tokens: int) -> torch.Tensor:
        """[num_tokens, L', K], each token's experts ascending; padding behind them left out."""
        if not self._layers:
            return self._answers.new_zeros(num_tokens, 0, self._top_k)
        stacked = torch.stack([of_layer[:num_tokens] for of_layer in ids], dim=1)
        return stacked.sort(dim=-1).values.to(self.type)


class RouteLog:
    """Passes through the model's modules that record the experts: tensor-parallel ranks hold parts
    of the row, and gather them here.
    """

    def __init__(
        self,
        chunks: Sequence[MegatronModule],
        groups: Groups,
        capture: RouterCapture,
        routes: Routes,
    ) -> None:
        """
        Args:
            chunks: this rank's chunks of the model.
            groups: process groups.
            capture: of the chunks' routers.
            routes: where the experts are kept.
        """
        self._chunks, self._groups, self._capture = chunks, groups, capture
        self.routes = routes

    def prefill(
        self, tokens: torch.Tensor, placement: Placement, lengths: Sequence[int]
    ) -> torch.Tensor | None:
        """Run `forward_stages` on packed prompts of these lengths, and record their experts."""
        output, ids = self._forward(tokens, placement)
        self.routes.add_prompts(ids, lengths)
        return output

    def decode(
        self, tokens: torch.Tensor, placement: Placement, rows: torch.Tensor, step: int
    ) -> torch.Tensor | None:
        """Run `forward_stages` on token number ``step`` of the answers ``rows`` (int64 [R]) and on
        padding behind them, and record the experts.
        """
        output, ids = self._forward(tokens, placement)
        self.routes.add_answers(ids, rows, step)
        return output

    def _forward(
        self, tokens: torch.Tensor, placement: Placement
    ) -> tuple[torch.Tensor | None, list[torch.Tensor]]:
        """The output of the pass, and the experts [T, K] of every token of the row by layer."""
        with self._capture.record_routes() as routes:
            output = forward_stages(self._chunks, tokens, placement, self._groups)
        # Sent as bytes, because neither gloo nor NCCL sends 16-bit integers.
        whole = [
            gather_first_dim(routes[layer].view(torch.uint8), self._groups.tensor)
            for layer in self._capture.layers_of()
        ]
        return output, [of_layer.view(self.routes.type) for of_layer in whole]
