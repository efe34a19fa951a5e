"""The feed-forward part of a layer: a SwiGLU MLP, or a router and its experts.

Legend: T tokens, D hidden size, E experts, K experts of a token, F inner width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_rl.models.experts import grouped_mm
from megatron_rl.rollout.builtin.plain.weights import Dense, Mixture


@dataclass(frozen=True)
class Routing:
    """How a router chooses; see the fields of Megatron's configuration."""

    top_k: int
    score: str  #: softmax or sigmoid
    pre_softmax: bool
    groups: int | None
    group_top_k: int | None
    factor: float | None

    @classmethod
    def of(cls, config: TransformerConfig) -> Routing:
        """As a configuration says."""
        return cls(
            config.moe_router_topk,
            config.moe_router_score_function,
            config.moe_router_pre_softmax,
            config.moe_router_num_groups,
            config.moe_router_group_topk,
            config.moe_router_topk_scaling_factor,
        )


class Chosen(NamedTuple):
    """What a router chose."""

    ids: torch.Tensor  #: int64 [T, K]
    logits: torch.Tensor | None  #: fp32 [T, E]; None: not kept


def swiglu(x: torch.Tensor, mlp: Dense) -> torch.Tensor:
    """down(silu(gate(x)) * up(x)): [T, D] -> [T, D], of a slice of F this rank's part of a sum."""
    gate, up = F.linear(x, mlp.up).chunk(2, dim=-1)
    return F.linear(F.silu(gate).mul_(up), mlp.down)


def choose(
    logits: torch.Tensor, bias: torch.Tensor | None, routing: Routing
) -> tuple[torch.Tensor, torch.Tensor]:
    """The experts of each token and their weights, as Megatron's top-K router gives them.

    Args:
        logits: fp32 [T, E].
        bias: added to sigmoid scores where experts are chosen, not to their weights (DeepSeek-V3,
            arXiv 2412.19437, eq. 16).
        routing: how to choose.

    Returns:
        Ids int64 and weights fp32, both [T, K].
    """
    if routing.score == "softmax":
        scores = logits.softmax(-1) if routing.pre_softmax else logits
        weights, ids = _top_k(scores, routing)
        weights = weights if routing.pre_softmax else weights.softmax(-1)
    else:
        scores = logits.sigmoid()
        _, ids = _top_k(scores if bias is None else scores + bias, routing)
        weights = scores.gather(1, ids)
        if routing.top_k > 1:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return ids, weights * routing.factor if routing.factor else weights


def _top_k(scores: torch.Tensor, routing: Routing) -> tuple[torch.Tensor, torch.Tensor]:
    """The K best, of group-limited routing those in the groups with the best sums of their best
    K / groups (DeepSeek-V3, section 2.1.2).
    """
    if routing.group_top_k and routing.groups:
        of_groups = scores.unflatten(-1, (routing.groups, -1))
        best = of_groups.topk(routing.top_k // routing.group_top_k, dim=-1).values.sum(-1)
        kept = best.topk(routing.group_top_k, dim=-1, sorted=False).indices
        outside = torch.ones_like(best, dtype=torch.bool).scatter(1, kept, False)
        scores = of_groups.masked_fill(outside[..., None], float("-inf")).flatten(1)
    return scores.topk(routing.top_k, dim=-1)


def mixture(
    x: torch.Tensor, weights: Mixture, routing: Routing, keep: torch.Tensor | None = None
) -> tuple[torch.Tensor, Chosen]:
    """A MoE layer on [T, D].

    Args:
        x: tokens.
        weights: of this rank.
        routing: how the router chooses.
        keep: int64 [T'], the tokens that the experts run on; None: all.

    Returns:
        What the experts held here give, shared ones included: [T or T', D], this rank's part of a
        sum where others hold the rest. And what the router chose for all tokens.
    """
    logits = F.linear(x.float(), weights.router.float())
    ids, probs = choose(logits, weights.bias, routing)
    chosen = Chosen(ids, logits)
    if keep is not None:
        x, ids, probs = x[keep], ids[keep], probs[keep]
    longest = longest_if_padded(ids, weights)
    if longest is None:
        output = _sorted(x, ids, probs, weights)
    else:
        output = _padded(x, ids, probs, weights, longest)
    if weights.shared is not None:
        shared = swiglu(x, weights.shared)
        if weights.shared_gate is not None:
            shared = shared * F.linear(x, weights.shared_gate).sigmoid()
        output = output + shared
    return output, chosen


#: Pairs of an expert, on average, from which one product for each expert keeps two threads busy.
MANY_PAIRS = 96
#: A batch of all experts' tokens may be this many times as large as the tokens are.
PADDED = 2.0


def longest_if_padded(ids: torch.Tensor, weights: Mixture) -> int | None:
    """The most tokens of an expert, where the experts should multiply as one padded batch: small
    products, each of which several threads of a CPU would have to share. None: they should not.
    """
    experts = len(weights.router)
    if ids.device.type != "cpu" or torch.get_num_threads() == 1:
        return None
    if len(weights.up) < experts or not 0 < ids.numel() < MANY_PAIRS * experts:
        return None
    longest = int(torch.bincount(ids.flatten(), minlength=experts).max())
    # Few pairs cost the reading of the weights, which padding does not change.
    return longest if longest * experts <= max(PADDED * ids.numel(), 8 * experts) else None


def _padded(
    x: torch.Tensor, ids: torch.Tensor, probs: torch.Tensor, weights: Mixture, longest: int
) -> torch.Tensor:
    """Each expert on its tokens: two batched products over [E, longest] places, some empty."""
    experts, top_k = len(weights.up), ids.shape[1]
    of_tokens = x.new_zeros(len(x), experts, dtype=torch.int64).scatter_(1, ids, 1)
    places = of_tokens.cumsum(0).gather(1, ids).add_(ids * longest - 1)
    inputs = x.new_zeros(experts * longest, x.shape[1])
    copies = x[:, None].expand(-1, top_k, -1).reshape(-1, x.shape[1])
    inputs.index_copy_(0, places.flatten(), copies)
    scale = probs.new_zeros(experts * longest).index_copy_(0, places.flatten(), probs.flatten())
    gate, up = torch.bmm(inputs.view(experts, longest, -1), weights.up.mT).chunk(2, dim=-1)
    inner = F.silu(gate).mul_(up).mul(scale.view(experts, longest, 1)).to(x.dtype)
    outputs = torch.bmm(inner, weights.down.mT).flatten(0, 1)
    return F.embedding_bag(places, outputs, mode="sum")


def _sorted(
    x: torch.Tensor, ids: torch.Tensor, probs: torch.Tensor, weights: Mixture
) -> torch.Tensor:
    """Each expert held here on its tokens: two grouped products over the pairs of a token and an
    expert, sorted by expert. Nothing waits for the device.
    """
    held, top_k = len(weights.up), ids.shape[1]
    local = ids.flatten() - weights.first
    all_held = held == len(weights.router)
    if not all_held:  # the others' pairs come last, behind the last group
        local = torch.where((local >= 0) & (local < held), local, held)
    local, order = local.sort()
    of_experts = torch.arange(held, device=x.device)
    ends = torch.searchsorted(local, of_experts, right=True, out_int32=True)
    gate, up = grouped_mm(x.index_select(0, order // top_k), weights.up, ends).chunk(2, dim=-1)
    scale = probs.flatten().index_select(0, order)[:, None]
    inner = F.silu(gate).mul_(up).mul(scale).to(x.dtype)
    pairs = grouped_mm(inner, weights.down, ends)
    if not all_held:  # of no group: they hold anything
        pairs = pairs.masked_fill(local[:, None] == held, 0.0)
    places = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=x.device))
    return F.embedding_bag(places.view(-1, top_k), pairs, mode="sum")
