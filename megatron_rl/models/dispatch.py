"""Tokens on their way to the experts and back: each token's row is copied to each of its K experts,
and the K outputs are added.

The rows go to the ranks of their experts and back, or stay where the layer has copies of all
experts (`expert_weights`).

Megatron adds them with a scatter into zeros, and lays rows that arrive in chunks side by side even
where they have come from nowhere else. Both directions are a gather here: the backward pass of one
is the other. No row is added twice at once, so the sums have one order on every device.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.autograd.function import once_differentiable

from megatron_rl.models.experts import AllExperts


class PackMoELayer(MoELayer):
    """Megatron's layer; its all-to-all dispatcher is `GatheringDispatcher`."""

    def __init__(
        self, config: TransformerConfig, *args: Any, pg_collection: Any = None, **kwargs: Any
    ) -> None:
        pg_collection = pg_collection or get_default_pg_collection()
        super().__init__(config, *args, pg_collection=pg_collection, **kwargs)
        if config.moe_token_dispatcher_type == "alltoall":
            self.token_dispatcher = GatheringDispatcher(
                self.num_local_experts,
                self.local_expert_indices,
                config=config,
                pg_collection=pg_collection,
            )

    def compute_with(self, experts: AllExperts | None) -> None:
        """From now on all tokens of this rank stay on it and are computed with these experts; None:
        they go to the ranks of their experts. Both parts have to be ours: `GroupedExperts` and
        `GatheringDispatcher`.
        """
        self.experts.all_experts = experts
        self.token_dispatcher.tokens_stay = experts is not None


class GatheringDispatcher(MoEAlltoAllTokenDispatcher):
    """Megatron's exchange between copies and sums that are gathers; with one expert-parallel rank
    nothing but them. Every token goes to exactly K experts.
    """

    tokens_stay: bool = False  #: this rank has copies of all experts
    tokens_per_expert: Any
    _copies: Copies | None = None

    def dispatch_preprocess(
        self, hidden_states: torch.Tensor, routing_map: torch.Tensor, probs: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens [T, 1, D], choice bool [T, E] and weights [T, E] -> rows [T K, D] sorted by
        expert, and their weights [T K].
        """
        self.hidden_shape = hidden_states.shape
        self.probs, self.routing_map = probs, routing_map
        tokens = hidden_states.view(-1, self.hidden_shape[-1])
        self.hidden_shape_before_permute = tokens.shape
        if self.tokens_stay:
            self.tokens_per_expert = routing_map.sum(0)
        else:
            counts = self.preprocess(routing_map)
            self.tokens_per_expert = self._maybe_dtoh_and_synchronize(
                "before_permutation_1", counts
            )
        self._copies = Copies(routing_map, self.config.moe_router_topk)
        return self._copies.spread(tokens), self._copies.weights(probs)

    def token_dispatch(
        self, permutated_local_input_tokens: torch.Tensor, permuted_probs: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows [T K, D] and weights [T K] -> those for this rank's experts, [N, D] and [N]."""
        if self.tokens_stay:
            return permutated_local_input_tokens, permuted_probs
        return super().token_dispatch(permutated_local_input_tokens, permuted_probs)

    def token_combine(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The way back."""
        if self.tokens_stay:
            return hidden_states
        return super().token_combine(hidden_states, *args, **kwargs)

    def dispatch_postprocess(
        self, global_input_tokens: torch.Tensor, global_probs: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Rows [N, D] and weights [N] from all ranks -> rows sorted by local expert, number of rows
        of each, weights.
        """
        if self._exchanges:
            return super().dispatch_postprocess(global_input_tokens, global_probs)
        if self.tokens_stay:
            counts, self.tokens_per_expert = self.tokens_per_expert, None
            return global_input_tokens, counts, global_probs
        counts = self._maybe_dtoh_and_synchronize("before_permutation_2", self.tokens_per_expert)
        counts = self._maybe_dtoh_and_synchronize("before_finish", counts)
        self.tokens_per_expert = None
        return global_input_tokens, counts, global_probs

    def combine_preprocess(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Rows [N, D] sorted by local expert -> in the order they came in."""
        if self._exchanges:
            return super().combine_preprocess(hidden_states)
        return hidden_states

    @property
    def _exchanges(self) -> bool:
        return self.ep_size * self.tp_size > 1 and not self.tokens_stay

    def combine_postprocess(self, permutated_local_input_tokens: torch.Tensor) -> torch.Tensor:
        """Rows [T K, D] -> each token's sum, [T, 1, D]."""
        copies, self._copies = self._copies, None  # its indices need not wait for the next pass
        assert copies is not None, "tokens went out before"
        return copies.add_up(permutated_local_input_tokens).view(self.hidden_shape)


class Copies:
    """Which rows are copies of which token: T tokens, K rows each, sorted by expert, then by token.

    ``tokens`` int64 [T K]: the token of a row. ``rows`` int64 [T, K]: the rows of a token, by
    ascending expert. ``cells`` int64 [T K]: the row's place in [T, E].
    """

    def __init__(self, routing_map: torch.Tensor, top_k: int) -> None:
        """routing_map: bool [T, E], K true in each row."""
        num_tokens, num_experts = routing_map.shape
        # The number of rows is known, so nothing waits for the device.
        found = torch.nonzero_static(routing_map.T, size=num_tokens * top_k)
        experts, self.tokens = found.unbind(1)
        self.cells = self.tokens * num_experts + experts
        self.rows = self.tokens.argsort(stable=True).view(num_tokens, top_k)

    def spread(self, tokens: torch.Tensor) -> torch.Tensor:
        """[T, D] -> [T K, D]."""
        return _Spread.apply(tokens, self.tokens, self.rows)

    def add_up(self, rows: torch.Tensor) -> torch.Tensor:
        """[T K, D] -> [T, D]."""
        return _AddUp.apply(rows, self.tokens, self.rows)

    def weights(self, probs: torch.Tensor) -> torch.Tensor:
        """[T, E] -> those of the rows, [T K]."""
        return _Pick.apply(probs, self.cells)


def _sums(rows: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """rows [N, D], places int64 [T, K] -> sum of the K rows of each token, [T, D]."""
    if places.shape[1] == 1:
        return rows.index_select(0, places[:, 0])
    # detached: torch prepares for a backward pass of its own otherwise
    return F.embedding_bag(places, rows.detach(), mode="sum")


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, tokens: torch.Tensor, token_of: torch.Tensor, rows_of: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(rows_of)
        return tokens.index_select(0, token_of)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return _sums(grad, *ctx.saved_tensors), None, None


class _AddUp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: torch.Tensor, token_of: torch.Tensor, rows_of: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(token_of)
        return _sums(rows, rows_of)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (token_of,) = ctx.saved_tensors
        return grad.index_select(0, token_of), None, None


class _Pick(torch.autograd.Function):
    """Cells of a table, each at most once."""

    @staticmethod
    def forward(ctx: Any, table: torch.Tensor, cells: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cells)
        ctx.shape = table.shape
        return table.reshape(-1).index_select(0, cells)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        (cells,) = ctx.saved_tensors
        whole = grad.new_zeros(ctx.shape.numel())
        return whole.index_copy_(0, cells, grad).view(ctx.shape), None
