"""Which experts count in the router distance d_l of a layer, and how much.

    top_k          1/K sum_k |log r_new(e_k) - log r_old(e_k)|, e_k the old top-K: the paper's;
                   or the mean over those of them that the old router scored highest
    gate_weighted  sum_k g_k |...| / sum_k g_k, g_k = r_old(e_k): an expert counts as much as it did
    union          the mean over the old and the new top-K: experts that enter count as well

Shapes: T tokens, K experts per token, E experts, N of them that are compared.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from megatron_rl.algorithms.ratios import at_least_float32
from megatron_rl.algorithms.router_shift import shift_distance

#: Names of the rules; the paper's is top_k.
DISTANCES = ("top_k", "gate_weighted", "union")


class DistanceRule(Protocol):
    """One of the three; `distance_rule` chooses it by name, and nothing else asks for the name."""

    @property
    def every_expert(self) -> bool:
        """Whether it compares all E experts (N = E), or the old top-K (N = K)."""

    def distance(
        self, new: torch.Tensor, old: torch.Tensor, old_ids: torch.Tensor, chosen: torch.Tensor
    ) -> torch.Tensor:
        """d_l, [T] nats.

        new, old: log r of the N experts under the new and the old router, [T, N]. old_ids: the old
        top-K, int64 [T, K]. chosen: the new top-K, bool [T, E].
        """


@dataclass(frozen=True)
class OldTopK:
    """The mean over the old top-K (arXiv 2510.23027 v2, eq. 5), or over the highest of them."""

    experts: int | None = None  #: how many count, of the highest old scores; None: all K
    every_expert: bool = False

    def distance(
        self, new: torch.Tensor, old: torch.Tensor, old_ids: torch.Tensor, chosen: torch.Tensor
    ) -> torch.Tensor:
        """[T, K] -> [T]. ValueError: K is less than the experts that count."""
        if self.experts is not None and self.experts != old.shape[1]:
            if self.experts > old.shape[1]:
                raise ValueError(f"found {old.shape[1]} experts; expected at least {self.experts}")
            old, highest = old.topk(self.experts, dim=1)
            new = new.gather(1, highest)
        return shift_distance(new[:, None], old[:, None])


@dataclass(frozen=True)
class GateWeighted:
    """The mean over the old top-K, weighed by the old router's scores."""

    every_expert: bool = False

    def distance(
        self, new: torch.Tensor, old: torch.Tensor, old_ids: torch.Tensor, chosen: torch.Tensor
    ) -> torch.Tensor:
        """[T, K] -> [T]."""
        return weighted_distance(new, old, at_least_float32(old).softmax(1))


@dataclass(frozen=True)
class UnionOfTopK:
    """The mean over the experts that the old or the new router chose, K to 2 K of them."""

    every_expert: bool = True

    def distance(
        self, new: torch.Tensor, old: torch.Tensor, old_ids: torch.Tensor, chosen: torch.Tensor
    ) -> torch.Tensor:
        """[T, E] -> [T]."""
        return weighted_distance(new, old, chosen.bool().scatter(1, old_ids, True))


def weighted_distance(new: torch.Tensor, old: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """sum_n c_n |new_n - old_n| / sum_n c_n: three [T, N], weights >= 0 and not all 0 -> [T]."""
    difference = (at_least_float32(new) - at_least_float32(old)).abs()
    weights = weights.to(difference.dtype)
    return (weights * difference).sum(1) / weights.sum(1)


def distance_rule(distance: str, experts: int | None = None) -> DistanceRule:
    """The rule of a name in `DISTANCES`. ``experts``: of top_k, see `OldTopK`. ValueError: none has
    that name.
    """
    rules: dict[str, DistanceRule] = {
        "top_k": OldTopK(experts),
        "gate_weighted": GateWeighted(),
        "union": UnionOfTopK(),
    }
    if distance not in rules:
        raise ValueError(f"found distance {distance!r}; expected one of {', '.join(DISTANCES)}")
    return rules[distance]
