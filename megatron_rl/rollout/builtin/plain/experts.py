"""The feed-forward part of a layer: a SwiGLU MLP, or a router and its experts.

Legend: T tokens, D hidden size, E experts, K experts of a token, F inner width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_rl.models.experts import grouped_mm
from megatron_rl.rollout.builtin.plain.weights import Dense, Mixture

#: On a CPU all experts see all tokens where that is at most this many times the work of the chosen
#: ones: one product over a few rows costs little more than the reading of the weights.
DENSE_WORK = 4.0
#: ... and where an expert would have fewer than this many tokens of its own, on average.
DENSE_ROWS = 16.0


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
    x: torch.Tensor, weights: Mixture, routing: Routing
) -> tuple[torch.Tensor, torch.Tensor]:
    """A MoE layer on [T, D].

    Returns:
        What the experts held here give, shared ones included: [T, D], this rank's part of a sum
        where others hold the rest. And the ids int64 [T, K] of the chosen experts.
    """
    logits = F.linear(x.float(), weights.router.float())
    ids, probs = choose(logits, weights.bias, routing)
    if x.device.type == "cpu" and _all_see_all(len(x), len(weights.up), logits.shape[1], routing):
        output = _everywhere(x, ids, probs, weights, logits.shape[1])
    else:
        output = _sorted(x, ids, probs, weights)
    if weights.shared is not None:
        shared = swiglu(x, weights.shared)
        if weights.shared_gate is not None:
            shared = shared * F.linear(x, weights.shared_gate).sigmoid()
        output = output + shared
    return output, ids


def _all_see_all(tokens: int, held: int, experts: int, routing: Routing) -> bool:
    own = tokens * routing.top_k / experts
    return held > 0 and own < DENSE_ROWS and experts / routing.top_k <= DENSE_WORK


def _everywhere(
    x: torch.Tensor, ids: torch.Tensor, probs: torch.Tensor, weights: Mixture, experts: int
) -> torch.Tensor:
    """All experts held here on all tokens; those that were not chosen have weight zero."""
    held = len(weights.up)
    gates = probs.new_zeros(len(x), experts).scatter_(1, ids, probs)
    gates = gates[:, weights.first : weights.first + held]
    inner = torch.bmm(x.expand(held, *x.shape), weights.up.transpose(1, 2))
    gate, up = inner.chunk(2, dim=-1)
    inner = (F.silu(gate) * up * gates.T[..., None]).to(x.dtype)
    return torch.bmm(inner, weights.down.transpose(1, 2)).sum(0)


def _sorted(
    x: torch.Tensor, ids: torch.Tensor, probs: torch.Tensor, weights: Mixture
) -> torch.Tensor:
    """Each expert on its tokens: two grouped products over the pairs sorted by expert. Pairs of
    experts held elsewhere come last, behind the last group, and count as zero.
    """
    held, (num_tokens, top_k) = len(weights.up), ids.shape
    local = (ids - weights.first).flatten()
    elsewhere = (local < 0) | (local >= held)
    local = local.masked_fill(elsewhere, held)
    order = local.argsort()
    of_each = torch.arange(held, device=x.device)
    ends = torch.searchsorted(local[order], of_each, right=True, out_int32=True)
    gate, up = grouped_mm(x[order // top_k], weights.up, ends).chunk(2, dim=-1)
    inner = (F.silu(gate) * up * probs.flatten()[order, None]).to(x.dtype)
    sums = grouped_mm(inner, weights.down, ends)
    pairs = torch.empty_like(sums).index_copy_(0, order, sums)
    pairs = pairs.masked_fill(elsewhere[:, None], 0.0)  # no group: they hold anything
    return pairs.view(num_tokens, top_k, -1).sum(1)
