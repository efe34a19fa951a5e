"""How far the routers have moved, per token (router shift, arXiv 2510.23027 v2, eq. 5-9).

Shapes: T tokens, L MoE layers, K experts per token. Log-probabilities are those of the K experts
that the OLD policy chose, under the new and the old router, normalised over ALL E experts (softmax
routers). A sigmoid router (DeepSeek-V3) gives the log of the sigmoid score without its bias, for
the experts chosen with the bias.
"""

from __future__ import annotations

import math

import torch

from megatron_rl.algorithms.aggregate import SumAndCount, make_segments, over_tokens
from megatron_rl.algorithms.ratios import at_least_float32

#: How the layers' distances d_l become one: their mean, the largest, or a quantile of them.
LAYERS = ("mean", "max", "quantile")


def shift_distance(
    new_logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    layers: str = "mean",
    quantile: float = 1.0,
) -> torch.Tensor:
    """sum_l 1/K sum_k |log r_new,l(e(l,k)) - log r_old,l(e(l,k))|: [T, L, K] -> [T], nats.

    L may be the layers of one pipeline stage, even none: distances of stages are added BEFORE
    ``shift_weight``. With ``layers`` max: max_l instead of sum_l, and of stages the largest; then
    ``shift_weight`` takes num_layers 1. With ``layers`` quantile: ``layer_quantile``, of the layers
    of the whole model, and num_layers 1. Raises ValueError unless both are [T, L, K].
    """
    if new_logprobs.dim() != 3 or new_logprobs.shape != old_logprobs.shape:
        raise ValueError(
            f"found router log-probabilities of shapes {tuple(new_logprobs.shape)} and "
            f"{tuple(old_logprobs.shape)}; expected two [T, L, K] of one shape; score OLD experts"
        )
    difference = at_least_float32(new_logprobs) - at_least_float32(old_logprobs)
    return over_layers(difference.abs().mean(dim=2), layers, quantile)


def over_layers(distances: torch.Tensor, layers: str, quantile: float = 1.0) -> torch.Tensor:
    """Distances [T, L] of these layers -> [T]: the sum ("mean"), maximum ("max") or
    ``layer_quantile``. L may be 0 but for the last, which is over all layers of the model.
    """
    if layers not in LAYERS:
        raise ValueError(f"found layers {layers!r}; expected one of {', '.join(LAYERS)}")
    if layers == "quantile":
        return layer_quantile(distances, quantile)
    if layers == "mean" or distances.shape[1] == 0:
        return distances.sum(dim=1)
    return distances.amax(dim=1)


def layer_quantile(distances: torch.Tensor, quantile: float) -> torch.Tensor:
    """min{d_l : at least quantile * L of the layers have a distance <= d_l}, [T, L] -> [T].

    The ceil(quantile L)-th smallest, one of the layers' own distances, without interpolation. 1:
    the maximum. Raises ValueError for L = 0 or a quantile outside (0, 1].
    """
    num_layers = distances.shape[1]
    if num_layers < 1 or not 0.0 < quantile <= 1.0:
        raise ValueError(
            f"found quantile={quantile} over {num_layers} layers; expected one in (0, 1] and at "
            "least one MoE layer"
        )
    rank = math.ceil(quantile * num_layers - 1e-9)  # 0.07 * 100 is a little above 7
    return distances.kthvalue(max(rank, 1), dim=1).values


def layer_divisor(num_layers: int, layers: str) -> int:
    """``num_layers`` for ``shift_weight``: L of the whole model for a sum, else 1."""
    return num_layers if layers == "mean" else 1


def shift_weight(distance: torch.Tensor, num_layers: int, floor: float) -> torch.Tensor:
    """gamma~_t = stop_gradient(max(exp(-distance_t / num_layers), floor)): [T] -> [T].

    num_layers counts the MoE layers of the whole model. Exactly 1 where the distance is 0.
    Detached: with a gradient training collapses (arXiv 2510.23027 v1). Raises ValueError for
    num_layers < 1 or a floor outside [0, 1].
    """
    if num_layers < 1:
        raise ValueError(f"found num_layers={num_layers}; expected at least one MoE layer")
    if not 0.0 <= floor <= 1.0:
        raise ValueError(f"found floor={floor}; expected a number in [0, 1]; the paper's is 0.8")
    return (-at_least_float32(distance.detach()) / num_layers).exp().clamp(min=floor)


@torch.no_grad()
def acting_sum(
    weight: torch.Tensor, advantages: torch.Tensor, mask: torch.Tensor, mode: str
) -> SumAndCount:
    """Sum and count of gamma~ over the trained tokens it acts on: all, or those with A < 0.

    The latter for the mode negative_only. Those of all packs and ranks are added before
    ``normalise_shift``.
    """
    acting = mask.bool()
    if mode == "negative_only":
        acting = acting & (advantages.detach() < 0)
    segments = make_segments(acting, torch.zeros_like(acting, dtype=torch.long), 1, torch.float64)
    return over_tokens(weight.detach().double(), segments)


def normalise_shift(weight: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
    """gamma~_t / mean, [T], detached: its mean over the batch is then 1. A mean of 1: same bits."""
    return weight.detach() / mean.to(weight.dtype).clamp(min=torch.finfo(weight.dtype).tiny)


@torch.no_grad()
def shift_metrics(weight: torch.Tensor, floor: float, mask: torch.Tensor) -> dict[str, SumAndCount]:
    """Over trained tokens, (sum, count) of gamma~ and of gamma~ being the floor."""
    segments = make_segments(mask, torch.zeros_like(mask, dtype=torch.long), 1, weight.dtype)
    at_floor = (weight <= floor).to(weight.dtype)
    return {
        "router/gamma_mean": over_tokens(weight, segments),
        "router/floor_fraction": over_tokens(at_floor, segments),
    }
