"""All experts on each rank for the time of a pass: weights travel, and tokens stay.

Expert parallelism sends every token to the ranks of its experts and back, in each layer, forward
and backward, and in each layer the ranks wait for the one with the busiest experts. Here the ranks
that together hold each expert once gather the weights at the beginning of a pass, and compute their
own tokens with them; at its end each gets the gradients of its own experts, summed over the ranks.
Weights, gradients and optimizer states are held as before.
"""

from __future__ import annotations

import contextlib
import functools
from typing import Any, Iterator, Sequence

import torch
import torch.distributed as dist
from megatron.core.transformer.moe.moe_layer import MoELayer

from megatron_rl.models.dispatch import GatheringDispatcher, PackMoELayer
from megatron_rl.models.experts import GroupedExperts
from megatron_rl.parallel.groups import Groups


class GatheredMatrix:
    """A matrix of all experts, on its way to this rank until it is asked for."""

    def __init__(self, weight: torch.Tensor, groups: Groups, *, gated: bool) -> None:
        """A collective of the ranks that together hold each expert once.

        Args:
            weight: of this rank's experts, [E_local, out, in]; if experts are split over ranks, a
                slice of ``out`` (gated) or of ``in``.
            groups: process groups.
            gated: two matrices stand one above the other, and each of them is split.
        """
        self._slices, self._gated = groups.expert_tensor.size(), gated
        local, ranks = weight.detach().contiguous(), groups.experts.size()
        self._parts = local.new_empty((ranks, *local.shape))
        self._work: Any = dist.all_gather_into_tensor(
            self._parts.flatten(0, 1), local, group=groups.experts, async_op=True
        )

    def whole(self) -> torch.Tensor:
        """[E, out, in] with nothing split."""
        self._work.wait()
        return put_together(self._parts, self._slices, gated=self._gated)


def put_together(parts: torch.Tensor, slices: int, *, gated: bool) -> torch.Tensor:
    """What the ranks hold -> the experts, whole, [E, out, in].

    Args:
        parts: [ranks, E_local, out, in], in order of the ranks.
        slices: as many ranks in a row hold slices of the same experts.
        gated: the slices are of both halves of ``out``, each by itself; else of ``in``.
    """
    split = parts.unflatten(0, (-1, slices))
    if gated:
        halves = split.unflatten(3, (2, -1)).permute(0, 2, 3, 1, 4, 5)
        return halves.flatten(0, 1).flatten(1, 3)
    return split.permute(0, 2, 3, 1, 4).flatten(0, 1).flatten(2, 3)


def take_apart(whole: torch.Tensor, ranks: int, slices: int, *, gated: bool) -> torch.Tensor:
    """The inverse of `put_together`, contiguous."""
    experts = whole.unflatten(0, (ranks // slices, -1))
    if gated:
        halves = experts.unflatten(2, (2, slices, -1)).permute(0, 3, 1, 2, 4, 5)
        return halves.flatten(3, 4).flatten(0, 1).contiguous()
    return experts.unflatten(3, (slices, -1)).permute(0, 3, 1, 2, 4).flatten(0, 1).contiguous()


class _Matrix:
    """One weight of a layer's experts, in a pass."""

    def __init__(self, weight: torch.nn.Parameter, groups: Groups, *, gated: bool) -> None:
        self.weight = weight
        self._groups, self._gated = groups, gated
        self.drop()

    def drop(self) -> None:
        """Forget what a pass has left."""
        self._gathered: GatheredMatrix | None = None
        self._whole: torch.Tensor | None = None
        self._sum: torch.Tensor | None = None
        self._sent: torch.Tensor | None = None
        self._received: torch.Tensor | None = None
        self._work: Any = None

    def gather(self, backwards: int) -> None:
        """Begin; ``backwards``: gradients that the pass will add up."""
        self._left = backwards
        self._gathered = GatheredMatrix(self.weight, self._groups, gated=self._gated)

    def whole(self) -> torch.Tensor:
        """[E, out, in], a leaf of the graph."""
        if self._whole is None:
            assert self._gathered is not None, "asked for in a pass"
            self._whole, self._gathered = self._gathered.whole(), None
            if self._left and self.weight.requires_grad:
                self._whole.requires_grad_()
                self._whole.register_post_accumulate_grad_hook(self._add)
        return self._whole

    def _add(self, whole: torch.Tensor) -> None:
        """Add a gradient in fp32; send the sum on its way with the last."""
        assert whole.grad is not None, "has just been accumulated"
        grad, whole.grad = whole.grad.float(), None
        self._sum = grad if self._sum is None else self._sum.add_(grad)
        self._left -= 1
        if self._left == 0:
            self._send()

    def _send(self) -> None:
        ranks, slices = self._groups.experts.size(), self._groups.expert_tensor.size()
        if self._sum is None:  # no token of this rank has reached the layer
            self._sum = torch.zeros_like(self.whole(), dtype=torch.float32)
        self._sent, self._sum = take_apart(self._sum, ranks, slices, gated=self._gated), None
        self._received = torch.empty_like(self._sent)
        self._work = dist.all_to_all_single(
            self._received, self._sent, group=self._groups.experts, async_op=True
        )

    def reduce(self) -> None:
        """Add all ranks' gradients of this rank's experts to the weight's, in order of the
        ranks.
        """
        if self._work is None:
            self._send()
        self._work.wait()
        assert self._received is not None, "was sent"
        weight: Any = self.weight  # Megatron's marks are attributes
        for gradient in self._received:
            weight.main_grad.add_(gradient)
        self.drop()


def _whole(up: _Matrix, down: _Matrix) -> tuple[torch.Tensor, torch.Tensor]:
    return up.whole(), down.whole()


class ExpertWeights:
    """The experts of this rank's chunks."""

    def __init__(self, chunks: Sequence[torch.nn.Module], groups: Groups) -> None:
        slices = groups.expert_tensor
        assert groups.experts.rank() == groups.expert.rank() * slices.size() + slices.rank()
        modules = [module for chunk in chunks for module in chunk.modules()]
        self._layers = [module for module in modules if isinstance(module, PackMoELayer)]
        #: of each layer the matrix before the activation, and the one after
        self._matrices = [
            (
                _Matrix(layer.experts.linear_fc1.weight, groups, gated=True),
                _Matrix(layer.experts.linear_fc2.weight, groups, gated=False),
            )
            for layer in self._layers
        ]

    @contextlib.contextmanager
    def gathered(self, backwards: int) -> Iterator[None]:
        """A pass in which each rank computes its own tokens. A collective of the ranks that
        together hold each expert once.

        Args:
            backwards: backward passes of each layer; 0: none. If there are some, `reduce` has to
                be called in the pass.
        """
        for pair in self._matrices:
            for matrix in pair:
                matrix.gather(backwards)
        for layer, pair in zip(self._layers, self._matrices):
            layer.compute_with(functools.partial(_whole, *pair))
        try:
            yield
        finally:
            for layer, pair in zip(self._layers, self._matrices):
                layer.compute_with(None)
                for matrix in pair:
                    matrix.drop()

    def reduce(self) -> list[torch.nn.Parameter]:
        """Add the pass's gradients to the weights' (``main_grad`` of Megatron's data-parallel
        wrapper). A collective. Returns the weights.
        """
        trained = [m for pair in self._matrices for m in pair if m.weight.requires_grad]
        for matrix in reversed(trained):  # as backward passes send them
            matrix.reduce()
        return [matrix.weight for matrix in trained]


def can_gather(chunks: Sequence[torch.nn.Module]) -> bool:
    """Whether the experts and dispatchers of all MoE layers are ours."""
    return all(
        isinstance(module, PackMoELayer)
        and isinstance(module.experts, GroupedExperts)
        and isinstance(module.token_dispatcher, GatheringDispatcher)
        for chunk in chunks
        for module in chunk.modules()
        if isinstance(module, MoELayer)
    )
