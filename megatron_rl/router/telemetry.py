"""What the routers did in a step, layer by layer: load, entropy, distance, overlap. And what else
needs the sums of all ranks first: the clip split, the spread of the weights.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from megatron_rl.algorithms.router_shift import raw_gamma
from megatron_rl.algorithms.weight_spread import KINDS, spread_metrics
from megatron_rl.router.clip_split import ClipSplit, quartile_fractions

#: Sums over tokens: of the routers' choice, and of its distance to a trace.
_CHOICE = ("tokens", "entropy")
_SHIFT = ("compared", "distance", "raw_gamma", "floored", "overlap")


class RouterTelemetry:
    """Sums over the tokens of a step that count. One reduction at its end; nothing is read back to
    the host before.

    Every rank holds sums of the layers and tokens it saw and zeros elsewhere, so one sum over all
    ranks is right under any split: pipeline stages hold other layers, tensor (sequence-parallel),
    context and data ranks other tokens; expert-parallel ranks route their own tokens only. The clip
    split and the weights count whole packs on every tensor and context rank of the last stage, each
    token as often as any other, so what is made of them, quotients of sums, is right as well.
    """

    COLUMNS = (*_CHOICE, *_SHIFT)

    def __init__(
        self, num_layers: int, num_experts: int, device: torch.device, floor: float = 0.0
    ) -> None:
        """floor: of gamma; tokens of a layer with exp(-distance) below it are counted."""
        self.sums = torch.zeros(num_layers, len(self.COLUMNS), dtype=torch.float64, device=device)
        self.load = torch.zeros(num_layers, num_experts, dtype=torch.float64, device=device)
        self.furthest = torch.zeros(num_layers, dtype=torch.float64, device=device)
        self.clip_split = ClipSplit(device)
        #: of `algorithms.weight_spread.weight_sums`
        self.weights = torch.zeros(len(KINDS), 5, dtype=torch.float64, device=device)
        self._floor = floor

    def add_choice(
        self, layer: int, weights: torch.Tensor, entropy: torch.Tensor, routing_map: torch.Tensor
    ) -> None:
        """Count one pack of layer ``layer`` (from 0): entropy [T_local], map bool [T_local, E].

        ``weights``: bool or int64 [T_local], how often each token counts: where sequences share
        their prompt a token stands for several.
        """
        weights = weights.to(entropy.dtype)
        columns = torch.stack([torch.ones_like(entropy), entropy])
        self.sums[layer, : len(_CHOICE)] += columns @ weights
        self.load[layer] += weights @ routing_map.to(weights.dtype)

    def add_shift(
        self, layer: int, weights: torch.Tensor, distance: torch.Tensor, overlap: torch.Tensor
    ) -> None:
        """Count how far a pack of layer ``layer`` is from its trace: all [T_local]."""
        weights, gamma = weights.to(distance.dtype), raw_gamma(distance)
        floored = (gamma < self._floor).to(distance.dtype)
        columns = torch.stack([torch.ones_like(distance), distance, gamma, floored, overlap])
        self.sums[layer, len(_CHOICE) :] += columns @ weights
        furthest = torch.where(weights > 0, distance, 0.0).max().double()
        self.furthest[layer] = torch.maximum(self.furthest[layer], furthest)

    def reduce(self, world: ProcessGroup) -> dict[str, float]:
        """Metrics of the step over all ranks; names as in observe/README.md. A collective: one sum,
        one maximum, one wait for the device.
        """
        parts = (self.sums, self.load, self.clip_split.counts, self.weights)
        flat, furthest = torch.cat([part.flatten() for part in parts]), self.furthest.clone()
        if world.size() > 1:
            dist.all_reduce(flat, group=world)
            dist.all_reduce(furthest, op=dist.ReduceOp.MAX, group=world)
        *flats, furthest = (
            torch.cat([flat, furthest])
            .cpu()
            .split([*(part.numel() for part in parts), len(furthest)])
        )
        sums, load, clip_counts, weights = (f.view_as(part) for f, part in zip(flats, parts))
        metrics = _choice_metrics(sums, load) | self._shift_metrics(sums, furthest)
        metrics |= spread_metrics(weights)
        for number, fraction in enumerate(quartile_fractions(clip_counts), start=1):
            metrics[f"clip_fraction/gamma_q{number}"] = fraction
        return metrics

    def _shift_metrics(self, sums: torch.Tensor, furthest: torch.Tensor) -> dict[str, float]:
        means = _layer_means(sums[:, len(_CHOICE) :])
        columns = {
            "router/distance_mean": 0,
            "router/raw_gamma_mean": 1,
            "router/floor_fraction": 2,
            "router/top_k_overlap": 3,
        }
        if self._floor <= 0:
            del columns["router/floor_fraction"]
        metrics = {}
        for layer, row in means.items():
            for name, column in columns.items():
                metrics[f"{name}/layer_{layer:02d}"] = row[column]
            metrics[f"router/distance_max/layer_{layer:02d}"] = float(furthest[layer])
        for name in ("router/distance_mean", "router/top_k_overlap"):
            metrics |= _mean_of_layers(name, [row[columns[name]] for row in means.values()])
        if means:
            metrics["router/distance_max"] = float(furthest.max())
        return metrics


def _choice_metrics(sums: torch.Tensor, load: torch.Tensor) -> dict[str, float]:
    means = _layer_means(sums[:, : len(_CHOICE)])
    entropies = {layer: row[0] for layer, row in means.items()}
    peaks = {layer: float(load[layer].max() / load[layer].mean()) for layer in means}
    metrics: dict[str, float] = {}
    for name, values in (("router/entropy", entropies), ("router/load_max_over_mean", peaks)):
        metrics |= {f"{name}/layer_{layer:02d}": value for layer, value in values.items()}
        metrics |= _mean_of_layers(name, list(values.values()))
    return metrics


def _layer_means(sums: torch.Tensor) -> dict[int, list[float]]:
    """Columns [L, 1 + n], the first a count -> the means of the layers that have tokens."""
    return {
        layer: (sums[layer, 1:] / sums[layer, 0]).tolist()
        for layer in range(len(sums))
        if sums[layer, 0] > 0
    }


def _mean_of_layers(name: str, values: list[float]) -> dict[str, float]:
    return {name: sum(values) / len(values)} if values else {}
