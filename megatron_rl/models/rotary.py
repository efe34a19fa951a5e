"""Rotary position embedding (RoFormer, arXiv 2104.09864, section 3.2.2) of queries and keys.

Megatron's own makes two concatenations, three products and a sum of each, and the sines and cosines
anew in every layer. Here they are made once a pass, and the turn is one autograd function whose
backward pass is the turn back.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.attention import SelfAttention
from torch.autograd.function import once_differentiable


class RotarySelfAttention(SelfAttention):
    """Megatron's layer, which turns queries and keys by `rotate`."""

    def _adjust_key_value_for_inference(
        self,
        inference_context: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        rotary_pos_emb: Any,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Megatron calls this between the projections and its own turn, which it leaves out where
        the angles are None.
        """
        if rotary_pos_emb is not None and inference_context is None:
            cosines, sines = _turn_of(rotary_pos_emb[0], query.dtype)
            query, key = rotate(query, cosines, sines), rotate(key, cosines, sines)
            rotary_pos_emb = None
        return super()._adjust_key_value_for_inference(
            inference_context, query, key, value, rotary_pos_emb, *args, **kwargs
        )


def _turn_of(angles: Any, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and signed sines of the angles, in ``dtype``; all layers of a pass get the same
    tensor of angles, which remembers them.
    """
    turn: tuple[torch.Tensor, torch.Tensor] | None = getattr(angles, "turn", None)
    if turn is None or turn[0].dtype != dtype:
        sines = angles.sin()
        sines[..., : sines.shape[-1] // 2].neg_()
        turn = angles.turn = angles.cos().to(dtype), sines.to(dtype)
    return turn


def rotate(x: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor) -> torch.Tensor:
    """Turn channel i and channel i + r / 2 of the first r by their angle.

        y = x cos + (x with its halves exchanged) sin,    sin negative in the first half

    Args:
        x: [T, ..., d], d >= r.
        cosines: [T, ..., r], of x's type; sines: the same, signed.
    """
    return _Rotate.apply(x, cosines, sines)


class _Rotate(torch.autograd.Function):
    """The transpose of a turn is the turn by the opposite angle: the sines change sign."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(cosines, sines)
        return _rotated(x, cosines, sines, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        cosines, sines = ctx.saved_tensors
        return _rotated(grad, cosines, sines, -1), None, None


def _rotated(
    x: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor, direction: int
) -> torch.Tensor:
    width = cosines.shape[-1]
    if width < x.shape[-1]:
        head = _rotated(x[..., :width], cosines, sines, direction)
        return torch.cat((head, x[..., width:]), dim=-1)
    exchanged = torch.cat((x[..., width // 2 :], x[..., : width // 2]), dim=-1)
    return (x * cosines).addcmul_(exchanged, sines, value=direction)
