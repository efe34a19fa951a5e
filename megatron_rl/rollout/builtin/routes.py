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
from megatron_rl.rollout.builtin.plain.experts import Chosen
from megatron_rl.router.capture import RouterCapture, every_expert, score_logprobs
from megatron_rl.router.trace import id_dtype


class Routes:
    """The experts of the MoE layers of this rank, for all tokens, and perhaps the log-probabilities
    that a router trace holds.

    Legend: L' MoE layers of this rank, K experts of a token, E all experts, R answers, N longest
    answer.
    """

    def __init__(
        self,
        layers: Sequence[int],
        config: TransformerConfig,
        shape: tuple[int, int],
        device: torch.device,
        num_logprobs: int = 0,
    ) -> None:
        """
        Args:
            layers: numbers of the MoE layers, ascending.
            config: of the model.
            shape: (R, N).
            device: of the model.
            num_logprobs: log-probabilities of a token and layer: of its K experts, or of all E; 0:
                none are kept.
        """
        self.num_logprobs = num_logprobs
        self._score = config.moe_router_score_function
        self._every_expert = num_logprobs > config.moe_router_topk
        self._layers, self._top_k = tuple(layers), config.moe_router_topk
        self.type = id_dtype(config.num_moe_experts or 1)
        self._prompts: list[torch.Tensor] = []
        # A last row takes the experts of places that hold no answer.
        self._answers = torch.zeros(
            shape[0] + 1, shape[1], len(layers), self._top_k, dtype=self.type, device=device
        )
        self._prompt_logprobs: list[torch.Tensor] = []
        self._answer_logprobs = torch.zeros(
            shape[0] + 1, shape[1], len(layers), num_logprobs, device=device
        )

    def add_prompts(self, chosen: Sequence[Chosen], lengths: Sequence[int]) -> None:
        """Record what the router of each layer chose for packed prompts of these lengths."""
        ids, logprobs = self._stacked(chosen, sum(lengths))
        self._prompts += ids.split(list(lengths))
        self._prompt_logprobs += logprobs.split(list(lengths))

    def add_answers(
        self, chosen: Sequence[Chosen], rows: torch.Tensor, step: int | torch.Tensor
    ) -> None:
        """Record what the router of each layer chose for token number ``step`` (also int64 0-d) of
        the answers ``rows`` int64 [R'], R for none.
        """
        places = rows * self._answers.shape[1] + step
        ids, logprobs = self._stacked(chosen, len(rows))
        self._answers.flatten(0, 1).index_copy_(0, places, ids)
        if self.num_logprobs:
            self._answer_logprobs.flatten(0, 1).index_copy_(0, places, logprobs)

    def take(self, prompt_of: Sequence[int], lengths: Sequence[int]) -> list[RoutedExperts]:
        """The experts of each prompt and answer: P + N - 1 tokens, since the last token was not fed
        to the model.

        Args:
            prompt_of: the number of each answer's prompt.
            lengths: the length N of each answer.
        """
        prompts = [prompt.cpu().numpy() for prompt in self._prompts]
        answers = self._answers.cpu().numpy()
        of_prompts = [prompt.cpu().numpy() for prompt in self._prompt_logprobs]
        of_answers = self._answer_logprobs.cpu().numpy()

        def joined(row: int, prompt: int, count: int) -> RoutedExperts:
            ids = np.concatenate([prompts[prompt], answers[row, : count - 1]])
            if not self.num_logprobs:
                return RoutedExperts(ids, self._layers)
            logprobs = np.concatenate([of_prompts[prompt], of_answers[row, : count - 1]])
            return RoutedExperts(ids, self._layers, logprobs=logprobs)

        return [
            joined(row, p, n) for row, (p, n) in enumerate(zip(prompt_of, lengths, strict=True))
        ]

    def _stacked(
        self, chosen: Sequence[Chosen], num_tokens: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids [num_tokens, L', K], each token's experts ascending, and their log-probabilities, or
        those of all experts; padding behind the tokens left out.
        """
        no_logprobs = self._answer_logprobs.new_zeros(num_tokens, len(self._layers), 0)
        if not self._layers:
            return self._answers.new_zeros(num_tokens, 0, self._top_k), no_logprobs
        ids = torch.stack([of_layer.ids[:num_tokens] for of_layer in chosen], dim=1)
        ids = ids.sort(dim=-1).values
        if not self.num_logprobs:
            return ids.to(self.type), no_logprobs
        kept = [of_layer.logits for of_layer in chosen if of_layer.logits is not None]
        assert len(kept) == len(chosen), "log-probabilities are wanted"
        logits = torch.stack([of_layer[:num_tokens] for of_layer in kept], dim=1).flatten(0, 1)
        scored = every_expert(logits) if self._every_expert else ids.flatten(0, 1)
        logprobs = score_logprobs(logits, scored, self._score)
        return ids.to(self.type), logprobs.view(num_tokens, len(kept), -1)


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
        output, chosen = self._forward(tokens, placement)
        self.routes.add_prompts(chosen, lengths)
        return output

    def decode(
        self, tokens: torch.Tensor, placement: Placement, rows: torch.Tensor, step: int
    ) -> torch.Tensor | None:
        """Run `forward_stages` on token number ``step`` of the answers ``rows`` (int64 [R]) and on
        padding behind them, and record the experts.
        """
        output, chosen = self._forward(tokens, placement)
        self.routes.add_answers(chosen, rows, step)
        return output

    def _forward(
        self, tokens: torch.Tensor, placement: Placement
    ) -> tuple[torch.Tensor | None, list[Chosen]]:
        """The output of the pass, and the experts of every token of the row by layer."""
        with self._capture.record_routes() as routes:
            output = forward_stages(self._chunks, tokens, placement, self._groups)
        # Sent as bytes, because neither gloo nor NCCL sends 16-bit integers.
        whole = [
            gather_first_dim(routes[layer].view(torch.uint8), self._groups.tensor)
            for layer in self._capture.layers_of()
        ]
        return output, [Chosen(of_layer.view(self.routes.type), None) for of_layer in whole]
