"""How far the routers have moved, per token (router shift, arXiv 2510.23027 v2, eq. 5-9).

Shapes: T tokens, L MoE layers, K experts per token. Log-probabilities are those of the K experts
that the OLD policy chose, under the new and the old router, normalised over ALL E experts (softmax
routers). A sigmoid router (DeepSeek-V3) gives the log of the sigmoid score without its bias, for
the experts chosen with the bias.
"""

from __future__ import annotations

import torch

from megatron_rl.algorithms.aggregate import SumAndCount, make_segments, over_tokens
from megatron_rl.algorithms.layer_rules import layer_rule
from megatron_rl.algorithms.ratios import at_least_float32


def shift_distance(
    new_logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    layers: str = "mean",
    quantile: float = 1.0,
) -> torch.Tensor:
    """sum_l 1/K sum_k |log r_new,l(e(l,k)) - log r_old,l(e(l,k))|: [T, L, K] -> [T], nats.

    L may be the layers of one pipeline stage, even none: distances of stages are added BEFORE
    ``shift_weight``. Training calls it a layer at a time, as soon as the router has fired, and
    joins the layers by the same rule (`layer_rules`): ``layers`` max gives max_l instead of sum_l,
    quantile the quantile of these layers, which must be all of the model. Raises ValueError unless
    both are [T, L, K].
    """
    if new_logprobs.dim() != 3 or new_logprobs.shape != old_logprobs.shape:
        raise ValueError(
            f"found router log-probabilities of shapes {tuple(new_logprobs.shape)} and "
            f"{tuple(old_logprobs.shape)}; expected two [T, L, K] of one shape; score OLD experts"
        )
    difference = at_least_float32(new_logprobs) - at_least_float32(old_logprobs)
    distances = difference.abs().mean(dim=2)
    rule = layer_rule(layers, quantile)
    return rule.total(rule.running(distances.T))


def raw_gamma(distance: torch.Tensor) -> torch.Tensor:
    """gamma_t = exp(-Delta_t), before the floor, of the distance of a layer or of all: any shape.

    Delta in nats, as ``shift_weight`` has it after the division. Exactly 1 where it is 0.
    """
    return (-distance).exp()


def shift_weight(
    distance: torch.Tensor, num_layers: int, floor: float, attached: bool = False
) -> torch.Tensor:
    """gamma~_t = stop_gradient(max(exp(-distance_t / num_layers), floor)): [T] -> [T].

    num_layers counts the MoE layers of the whole model (1 for the rules of one layer:
    `LayerRule.divisor`). Exactly 1 where the distance is 0.
    Detached: with a gradient training collapses (arXiv 2510.23027 v1). ``attached`` leaves the
    gradient in, to show that; below the floor there is none. Raises ValueError for num_layers < 1
    or a floor outside [0, 1].
    """
    if num_layers < 1:
        raise ValueError(f"found num_layers={num_layers}; expected at least one MoE layer")
    if not 0.0 <= floor <= 1.0:
        raise ValueError(f"found floor={floor}; expected a number in [0, 1]; the paper's is 0.8")
    distance = distance if attached else distance.detach()
    return raw_gamma(at_least_float32(distance) / num_layers).clamp(min=floor)


@torch.no_grad()
def acting_sum(
    weight: torch.Tensor, advantages: torch.Tensor, mask: torch.Tensor, mode: str
) -> SumAndCount:
    """Sum and count of gamma~ over the trained tokens that it acts on.

    These are all trained tokens; in the mode negative_only those with A < 0. Add the sums of all
    packs and ranks before ``normalise_shift``.
    """
    acting = mask.bool()
    if mode == "negative_only":
        acting = acting & (advantages.detach() < 0)
    segments = make_segments(acting, torch.zeros_like(acting, dtype=torch.long), 1, torch.float64)
    return over_tokens(weight.detach().double(), segments)


def normalise_shift(weight: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
    """gamma~_t / mean, [T]: its mean over the batch is then 1. A mean of 1: same bits."""
    return weight / mean.detach().to(weight.dtype).clamp(min=torch.finfo(weight.dtype).tiny)
