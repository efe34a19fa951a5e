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

from megatron_rl.models.norm import RMSNorm, norm_gradients, scaled


class RotarySelfAttention(SelfAttention):
    """Megatron's layer, which turns queries and keys by `rotate`, or makes them by `heads_of`."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None,
        *args: Any,
        rotary_pos_emb: Any = None,
        packed_seq_params: Any = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """[T, 1, D] -> [T, 1, D], and a bias or None. CUDA's norms are a kernel of torch's."""
        turns = isinstance(rotary_pos_emb, torch.Tensor) and not hidden_states.is_cuda
        if not turns or kwargs.get("inference_context") or not self._whole_heads():
            return super().forward(
                hidden_states,
                attention_mask,
                *args,
                rotary_pos_emb=rotary_pos_emb,
                packed_seq_params=packed_seq_params,
                **kwargs,
            )
        mixed, _bias = self.linear_qkv(hidden_states)
        groups, width = self.num_query_groups_per_partition, self.hidden_size_per_attention_head
        cosines, sines = _turn_of(rotary_pos_emb, mixed.dtype)
        heads = heads_of(
            mixed.view(*mixed.shape[:-1], groups, -1, width),
            cosines,
            sines,
            getattr(self.q_layernorm, "weight", None),
            getattr(self.k_layernorm, "weight", None),
            self.config.layernorm_epsilon,
        )
        return self.linear_proj(self.core_attention(*heads, packed_seq_params=packed_seq_params))

    def _whole_heads(self) -> bool:
        """Whether `heads_of` makes this rank's heads: without activations being recomputed, and
        with none or both of the norms over a head.
        """
        norms = [type(norm) for norm in (self.q_layernorm, self.k_layernorm)]
        plain = norms == [RMSNorm, RMSNorm] or not any(
            hasattr(norm, "weight") for norm in (self.q_layernorm, self.k_layernorm)
        )
        groups: int = self.config.num_query_groups
        recomputed = self.checkpoint_core_attention and self.training
        return plain and groups >= self.world_size and not recomputed

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
    x: torch.Tensor,
    cosines: torch.Tensor,
    sines: torch.Tensor,
    direction: int,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    width = cosines.shape[-1]
    if width < x.shape[-1]:
        head = _rotated(x[..., :width], cosines, sines, direction)
        return torch.cat((head, x[..., width:]), dim=-1, out=out)
    exchanged = torch.cat((x[..., width // 2 :], x[..., : width // 2]), dim=-1)
    return torch.addcmul(x * cosines, exchanged, sines, value=direction, out=out)


def heads_of(
    mixed: torch.Tensor,
    cosines: torch.Tensor,
    sines: torch.Tensor,
    query_norm: torch.Tensor | None,
    key_norm: torch.Tensor | None,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The heads in the output of the first linear layer, normalised (`norm.rms_norm`) and turned
    (`rotate`), as one autograd function.

    Args:
        mixed: [T, 1, G, n + 2, d], G groups of n queries, a key and a value.
        cosines, sines: see `rotate`.
        query_norm, key_norm: weights of the norms [d], or None.
        eps: of the norms.

    Returns:
        Queries [T, 1, G n, d], keys and values [T, 1, G, d].
    """
    query, key, value = _Heads.apply(mixed, cosines, sines, query_norm, key_norm, eps)
    return query.flatten(2, 3), key.flatten(2, 3), value.flatten(2, 3)


class _Heads(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        mixed: torch.Tensor,
        cosines: torch.Tensor,
        sines: torch.Tensor,
        query_norm: torch.Tensor | None,
        key_norm: torch.Tensor | None,
        eps: float,
    ) -> tuple[torch.Tensor, ...]:
        """[T, 1, G, n + 2, d] -> [T, 1, G, n, d], and twice [T, 1, G, 1, d]."""
        cosines, sines = cosines[:, :, None], sines[:, :, None]
        *turning, value = _parts(mixed)
        heads, scales = [], []
        for part, weight in zip(turning, (query_norm, key_norm), strict=True):
            if weight is not None:
                part, scale = scaled(part, weight, eps)
                scales.append(scale)
            heads.append(_rotated(part, cosines, sines, 1))
        ctx.save_for_backward(mixed, cosines, sines, query_norm, key_norm, *scales)
        return *heads, value.contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        mixed, cosines, sines, *norms = ctx.saved_tensors
        norms, scales = norms[:2], norms[2:]
        to_mixed = mixed.new_empty(mixed.shape)
        *turning, _value = _parts(mixed)
        *places, to_value = _parts(to_mixed)
        to_value.copy_(grads[2])
        to_norms: list[torch.Tensor | None] = [None, None]
        for number, (part, place) in enumerate(zip(turning, places, strict=True)):
            weight, grad = norms[number], grads[number]
            if weight is None:
                _rotated(grad, cosines, sines, -1, out=place)
                continue
            grad = _rotated(grad, cosines, sines, -1)
            to_part, to_norms[number] = norm_gradients(grad, part, weight, scales[number])
            place.copy_(to_part)
        return to_mixed, None, None, *to_norms, None


def _parts(mixed: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """[..., n + 2, d] -> queries [..., n, d], key and value [..., 1, d]."""
    return mixed.split([mixed.shape[-2] - 2, 1, 1], dim=-2)
