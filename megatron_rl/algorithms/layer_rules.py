"""How the router distances d_l of the MoE layers become one: mean, largest, quantile, or the last.

The layers of a model are spread over pipeline stages. So a rule works on a running value, which
holds what is known after some of the layers: each stage makes one of its own layers and joins it
to that of the stages before. The last stage takes the total.

Shapes: T tokens, L layers, R rows of a running value.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch

#: Names of the rules; the paper's is the mean.
LAYERS = ("mean", "max", "quantile", "last")


class LayerRule(Protocol):
    """One of the four; `layer_rule` chooses it by name, and nothing else asks for the name."""

    def running(self, distances: torch.Tensor) -> torch.Tensor:
        """Of some layers, possibly none: [L, T] -> [R, T]."""

    def rows(self, num_layers: int) -> int:
        """R of the running value of so many layers."""

    def join(self, before: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
        """Of all layers: [R, T] of the layers before and [R, T] of the layers behind them."""

    def total(self, running: torch.Tensor) -> torch.Tensor:
        """The distance that `shift_weight` takes: [R, T] of all layers -> [T]."""

    def divisor(self, num_layers: int) -> int:
        """``num_layers`` of `shift_weight`, for so many MoE layers of the whole model."""


@dataclass(frozen=True)
class MeanOfLayers:
    """1/L sum_l d_l: a running sum, divided by L in `shift_weight`."""

    def running(self, distances: torch.Tensor) -> torch.Tensor:
        """[L, T] -> [1, T]; 0 for no layer."""
        return distances if len(distances) == 1 else distances.sum(0, keepdim=True)

    def rows(self, num_layers: int) -> int:
        """1."""
        return 1

    def join(self, before: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
        """The sum."""
        return before + own

    def total(self, running: torch.Tensor) -> torch.Tensor:
        """[1, T] -> [T]."""
        return running[0]

    def divisor(self, num_layers: int) -> int:
        """L."""
        return num_layers


@dataclass(frozen=True)
class LargestOfLayers:
    """max_l d_l: a running maximum."""

    def running(self, distances: torch.Tensor) -> torch.Tensor:
        """[L, T] -> [1, T]; 0, the least distance there is, for no layer."""
        if len(distances) == 0:
            return distances.new_zeros(1, *distances.shape[1:])
        return distances.amax(0, keepdim=True)

    def rows(self, num_layers: int) -> int:
        """1."""
        return 1

    def join(self, before: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
        """The larger one."""
        return torch.maximum(before, own)

    def total(self, running: torch.Tensor) -> torch.Tensor:
        """[1, T] -> [T]."""
        return running[0]

    def divisor(self, num_layers: int) -> int:
        """1."""
        return 1


@dataclass(frozen=True)
class QuantileOfLayers:
    """min{d_l : at least quantile * L of the layers have a distance <= d_l}.

    The ceil(quantile L)-th smallest, one of the layers' own distances, without interpolation; the
    maximum for a quantile of 1. No running number holds it, so the running value is all distances.
    """

    quantile: float  #: in (0, 1]

    def running(self, distances: torch.Tensor) -> torch.Tensor:
        """[L, T], as it is."""
        return distances

    def rows(self, num_layers: int) -> int:
        """A row a layer."""
        return num_layers

    def join(self, before: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
        """One behind the other, in the order of the layers."""
        return torch.cat([before, own])

    def total(self, running: torch.Tensor) -> torch.Tensor:
        """[L, T] of all layers -> [T]. ValueError: L = 0, or a quantile outside (0, 1]."""
        num_layers = len(running)
        if num_layers < 1 or not 0.0 < self.quantile <= 1.0:
            raise ValueError(
                f"found quantile={self.quantile} over {num_layers} layers; expected one in (0, 1] "
                "and at least one MoE layer"
            )
        rank = math.ceil(self.quantile * num_layers - 1e-9)  # 0.07 * 100 is a little above 7
        return running.kthvalue(max(rank, 1), dim=0).values

    def divisor(self, num_layers: int) -> int:
        """1."""
        return 1


@dataclass(frozen=True)
class LastOfLayers:
    """d_L, of the last MoE layer alone: a running value that later layers replace."""

    def running(self, distances: torch.Tensor) -> torch.Tensor:
        """[L, T] -> [1, T]; [0, T] for no layer."""
        return distances[-1:]

    def rows(self, num_layers: int) -> int:
        """1, or 0 for no layer."""
        return min(num_layers, 1)

    def join(self, before: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
        """The later one, if there is one."""
        return own if len(own) else before

    def total(self, running: torch.Tensor) -> torch.Tensor:
        """[1, T] -> [T]."""
        return running[0]

    def divisor(self, num_layers: int) -> int:
        """1."""
        return 1


def layer_rule(layers: str, quantile: float = 1.0) -> LayerRule:
    """The rule of a name in `LAYERS`; ``quantile`` is for that rule alone. ValueError: none has
    that name.
    """
    rules: dict[str, LayerRule] = {
        "mean": MeanOfLayers(),
        "max": LargestOfLayers(),
        "quantile": QuantileOfLayers(quantile),
        "last": LastOfLayers(),
    }
    if layers not in rules:
        raise ValueError(f"found layers {layers!r}; expected one of {', '.join(LAYERS)}")
    return rules[layers]
