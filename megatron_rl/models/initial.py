"""Initial weights that depend on the seed and on the weight's name only, so that every layout
starts alike.
"""

from __future__ import annotations

import zlib
from typing import Iterable

import torch

from megatron_rl.models.parameters import ParameterView

#: Weights that write into the residual stream; their deviation shrinks with the depth (GPT-2).
RESIDUAL_OUTPUTS = ("linear_proj.weight", "linear_fc2.weight")


@torch.no_grad()
def initialise(views: Iterable[ParameterView], seed: int, std: float, num_layers: int) -> None:
    """Draw every matrix from N(0, std^2), residual outputs from N(0, std^2 / 2L); vectors keep what
    they have.

    The generator of a matrix is seeded with crc32("seed/name"), 32 bits because torch's generator
    reads no more of its seed; a rank draws the whole matrix and keeps its slice.
    """
    for view in views:
        target = view.of(view.parameter.data)
        if target.dim() < 2:
            continue
        deviation = std / (2 * num_layers) ** 0.5 if view.name.endswith(RESIDUAL_OUTPUTS) else std
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{view.name}".encode()))
        whole = torch.empty(view.global_shape()).normal_(0.0, deviation, generator=generator)
        target.copy_(view.slice_of(whole))
