"""The matrices of a transformer, each whole and separate, for optimizers that work on matrices.

A parameter of the model is a slice of a matrix under tensor parallelism, a stack of matrices where
it holds experts, and several matrices in one where query, key and value, or gate and up, are fused.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Sequence

import torch

from megatron_rl.families.common.names import ROUTER, SHARED_GATE, layer_of

if TYPE_CHECKING:
    from megatron_rl.models.parameters import ParameterView

#: Gates: weights that give one number for each expert, or one number in all.
_GATES = (ROUTER, SHARED_GATE)


@dataclass(frozen=True)
class Matrix:
    """One weight matrix of a layer, of which this rank may hold a slice: rows are outputs.

    ``split`` gives matrices as Hugging Face stores them: q, k, v, gate, up and each expert
    separate. ``join`` is its inverse.
    """

    view: ParameterView
    #: rows of query, key and value in a query group, if the matrix holds all three; None: it does
    #: not
    qkv: tuple[int, int, int] | None = None

    @property
    def name(self) -> str:
        """Name in the whole model: decoder.layers.3.mlp.experts.5.linear_fc1.weight."""
        return self.view.name

    @property
    def is_gate(self) -> bool:
        """Whether it belongs to a router or to the gate of a shared expert."""
        return (layer_of(self.name) or (0, ""))[1] in _GATES

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """A view of this matrix (or slice) in a tensor shaped like the parameter."""
        return self.view.of(tensor)

    def split(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """The whole matrices [m, n] in a tensor shaped like the parameter (gradient, momentum).

        A collective over the ranks that hold slices of it.
        """
        whole = self.view.gather(self.view.of(tensor))
        if self.qkv is not None:
            by_group = whole.unflatten(0, (-1, sum(self.qkv)))
            return [part.flatten(0, 1) for part in by_group.split(self.qkv, dim=1)]
        return list(whole.chunk(2)) if self.view.gated else [whole]

    def join(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        """This rank's slice of whole matrices, in the shape of ``of``."""
        if self.qkv is not None:
            groups = len(parts[1]) // self.qkv[1]
            whole = torch.cat([part.unflatten(0, (groups, -1)) for part in parts], 1).flatten(0, 1)
        else:
            whole = torch.cat(list(parts))
        return self.view.slice_of(whole)


def matrices_of(views: Sequence[ParameterView], qkv: tuple[int, int, int]) -> tuple[Matrix, ...]:
    """The matrices in one parameter; () for a norm, a bias, the embedding and the output layer.

    Args:
        views: of the parameter.
        qkv: see `Matrix`; for layers without latent attention.
    """
    return tuple(
        Matrix(view, qkv if view.name.endswith(".linear_qkv.weight") else None)
        for view in views
        if view.of(view.parameter).dim() == 2 and _is_hidden(view.name)
    )


def _is_hidden(name: str) -> bool:
    """Whether it is a weight of a layer, and no bias."""
    layer = layer_of(name)
    return layer is not None and layer[1].endswith((".weight", ".gate_weight"))
