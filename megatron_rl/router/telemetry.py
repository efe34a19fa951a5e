"""What the routers did in a step, per layer: shift, overlap with the old choice, entropy, load."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup


class RouterTelemetry:
    """Sums over the real tokens of a step; reduced once at its end.

    Every rank holds sums of the layers and tokens it saw and zeros elsewhere, so one sum over all
    ranks is right under any split: pipeline stages hold other layers, tensor (sequence-parallel),
    context and data ranks other tokens.
    """

    COLUMNS = ("tokens", "distance", "overlap", "entropy")

    def __init__(self, num_layers: int, num_experts: int, device: torch.device) -> None:
        self.sums = torch.zeros(num_layers, len(self.COLUMNS), dtype=torch.float64, device=device)
        self.load = torch.zeros(num_layers, num_experts, dtype=torch.float64, device=device)

    def add(
        self,
        layer: int,
        mask: torch.Tensor,
        distance: torch.Tensor,
        overlap: torch.Tensor,
        entropy: torch.Tensor,
        routing_map: torch.Tensor,
    ) -> None:
        """Count one pack of layer ``layer`` (from 0): mask, distance, overlap, entropy [T_local],
        map bool [T_local, E].
        """
        weights = mask.to(distance.dtype)
        columns = torch.stack([torch.ones_like(distance), distance, overlap, entropy])
        self.sums[layer] += columns @ weights
        self.load[layer] += weights @ routing_map.to(weights.dtype)

    def reduce(self, world: ProcessGroup) -> dict[str, float]:
        """Metrics of the step over all ranks; names as in observe/README.md. A collective; one host
        copy.
        """
        flat = torch.cat([self.sums.flatten(), self.load.flatten()])
        if world.size() > 1:
            dist.all_reduce(flat, group=world)
        flat = flat.cpu()
        sums = flat[: self.sums.numel()].view_as(self.sums)
        load = flat[self.sums.numel() :].view_as(self.load)
        layers = [i for i in range(len(sums)) if sums[i, 0] > 0]
        if not layers:
            return {}
        means = sums[layers, 1:] / sums[layers, :1]
        peaks = load[layers].max(dim=1).values / load[layers].mean(dim=1)
        metrics = {
            "router/distance_mean": means[:, 0].mean(),
            "router/top_k_overlap": means[:, 1].mean(),
            "router/entropy": means[:, 2].mean(),
            "router/load_max_over_mean": peaks.mean(),
        }
        for row, layer in enumerate(layers):
            metrics[f"router/distance_mean/layer_{layer:02d}"] = means[row, 0]
            metrics[f"router/top_k_overlap/layer_{layer:02d}"] = means[row, 1]
            metrics[f"router/load_max_over_mean/layer_{layer:02d}"] = peaks[row]
        return {name: float(value) for name, value in metrics.items()}
