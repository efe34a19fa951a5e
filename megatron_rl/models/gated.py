"""The SwiGLU product (arXiv 2002.05202, eq. 6) of the experts and dense layers, as one autograd
function.
"""

from __future__ import annotations

from typing import Any, Iterator

import torch
import torch.nn.functional as F
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.autograd.function import once_differentiable

#: Numbers of ``both`` in a block, for each thread: some such blocks fit in a core's cache.
BLOCK = 2**17
_silu, _silu_backward = torch.ops.aten.silu.out, torch.ops.aten.silu_backward.grad_input


def gated(both: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
    """silu(gate) * up * weight; for its backward pass it keeps its arguments and nothing else.

    Args:
        both: [..., 2F], gate before up.
        weights: [...], one of each row, or None.

    Returns:
        [..., F], of the type of ``both``.
    """
    return _Gated.apply(both, weights)


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, both: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(both, weights)
        result = both.new_empty(*both.shape[:-1], both.shape[-1] // 2)
        for block in _blocks(both, weights, result):
            gate_rows(*block)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        both, weights = ctx.saved_tensors
        to_both, sums = both.new_empty(both.shape), None
        if weights is not None and ctx.needs_input_grad[1]:
            sums = weights.new_empty(weights.shape)
        for block in _blocks(both, weights, grad, to_both, sums):
            slope_of_rows(*block)
        return to_both, sums


def gate_rows(both: torch.Tensor, weight: torch.Tensor | None, product: torch.Tensor) -> None:
    """Rows [n, 2F] and weights [n, 1] -> silu(gate) * up * weight, into ``product`` [n, F]."""
    gate, up = both.chunk(2, dim=-1)
    _silu(gate, out=product).mul_(up)
    if weight is not None:
        product.mul_(weight)


def slope_of_rows(
    both: torch.Tensor,
    weight: torch.Tensor | None,
    grad: torch.Tensor,
    to_both: torch.Tensor,
    to_weight: torch.Tensor | None,
) -> torch.Tensor:
    """The way back of `gate_rows` for the gradient [n, F], into ``to_both`` and ``to_weight``.

    With s = silu(gate), w the weight and g the gradient:

        d up = g w s,    d gate = g w up silu'(gate),    d w = sum of g s up

    Returns:
        s up, [n, F].
    """
    gate, up = both.chunk(2, dim=-1)
    to_gate, to_up = to_both.chunk(2, dim=-1)
    opened = F.silu(gate)
    weighted = grad if weight is None else (grad * weight).to(both.dtype)
    torch.mul(weighted, opened, out=to_up)
    _silu_backward(weighted * up, gate, grad_input=to_gate)
    product = opened.mul_(up)
    if to_weight is not None:
        torch.sum(product * grad, -1, keepdim=True, dtype=to_weight.dtype, out=to_weight)
    return product


def _blocks(*tensors: torch.Tensor | None) -> Iterator[tuple[Any, ...]]:
    """The tensors [..., W] as rows [n, W], weights [...] as [n, 1]; on a CPU in blocks that stay in
    the cache, in views of the same memory. The first has two axes or more.
    """
    first = tensors[0]
    assert first is not None, "what the others go with"
    rows = max(1, first.numel() // first.shape[-1])
    if first.device.type == "cpu":
        rows = max(1, BLOCK * torch.get_num_threads() // first.shape[-1])
    flat = [
        None
        if tensor is None
        else (tensor if tensor.dim() == first.dim() else tensor[..., None])
        .flatten(0, -2)
        .split(rows)
        for tensor in tensors
    ]
    for n in range(len(flat[0])):  # type: ignore[arg-type]  # the first is there
        yield tuple(None if blocks is None else blocks[n] for blocks in flat)


class GatedMLP(MLP):
    """Megatron's dense layer without biases, with `gated`."""

    def __init__(
        self,
        config: TransformerConfig,
        submodules: MLPSubmodules,
        pg_collection: Any = None,
        is_mtp_layer: bool = False,
        tp_group: Any = None,
        **kwargs: Any,
    ) -> None:
        """As MLP. Megatron 0.19 gives classes of others all groups, and whether the layer predicts
        tokens further ahead.
        """
        if tp_group is None and pg_collection is not None:
            tp_group = pg_collection.tp
        kwargs.setdefault("ffn_hidden_size", config.ffn_hidden_size)
        super().__init__(config, submodules, tp_group=tp_group, **kwargs)

    def forward(
        self, hidden_states: torch.Tensor, per_token_scale: Any = None, **_: Any
    ) -> tuple[torch.Tensor, None]:
        """[T, 1, D] -> [T, 1, D], and no bias."""
        assert per_token_scale is None, "only experts have one"
        both, _bias = self.linear_fc1(hidden_states)
        output, _bias = self.linear_fc2(gated(both))
        return output, None


class GatedSharedExperts(SharedExpertMLP, GatedMLP):
    """Megatron's shared experts on top of `GatedMLP`."""
