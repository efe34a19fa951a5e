"""RMSNorm for models without Transformer Engine."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.autograd.function import once_differentiable

from megatron_rl.config.schema import ModelConfig


def norms_over_heads(model: ModelConfig) -> bool:
    """Whether queries and keys are normalised over all heads together (OLMoE)."""
    return model.qk_norm and model.qk_norm_scope == "layer"


class RMSNorm(torch.nn.RMSNorm):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, usable under sequence
    parallelism.

    Megatron's own local norm refuses sequence parallelism because it does not mark its weight;
    Megatron sums the gradients of weights marked ``sequence_parallel`` over the tensor-parallel
    group.
    """

    def __init__(
        self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: object
    ) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self._eps = eps
        weight: Any = self.weight  # Megatron's marks are attributes
        weight.sequence_parallel = config.sequence_parallel

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., D] -> the same shape. CUDA has a kernel of torch's for this."""
        return super().forward(x) if x.is_cuda else rms_norm(x, self.weight, self._eps)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, in few passes over memory; bf16
    is computed in fp32 and rounded once.
    """
    return _RMSNorm.apply(x, weight, eps)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        result, scale = scaled(x, weight, eps)
        ctx.save_for_backward(x, weight, scale)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        return *norm_gradients(grad, *ctx.saved_tensors), None


def scaled(x: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """`rms_norm` without its gradient, and s = 1 / sqrt(mean(x^2) + eps), fp32 [..., 1]."""
    wide = _wide(x)
    # Not by torch's vector_norm: it adds up the squares in one chain, and its root rounds.
    result = wide.square()
    scale = result.mean(dim=-1, keepdim=True).add_(eps).rsqrt_()
    return torch.mul(wide, scale, out=result).mul_(weight).to(x.dtype), scale


def norm_gradients(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients in x and weight of `scaled`. With g the gradient of its result:

        dx = s w g - x s^3 mean(w g x),    dw = sum over rows of s g x

    The product g x serves both: its product with w, and with s, are matrix-vector products.
    """
    width = x.shape[-1]
    wide, grad, wide_weight = _wide(x), _wide(grad), _wide(weight)
    product = grad * wide
    rows = product.reshape(-1, width)
    to_weight = (scale.reshape(-1) @ rows).to(weight.dtype)
    back = (rows @ wide_weight).view(scale.shape).mul_(scale.pow(3)).div_(-width)
    torch.mul(grad, wide_weight, out=product).mul_(scale)
    return product.addcmul_(wide, back).to(x.dtype), to_weight


def _wide(x: torch.Tensor) -> torch.Tensor:
    return x.float() if x.dtype == torch.bfloat16 else x


class _NormOverHeads(torch.nn.Module):
    """RMSNorm over all heads of a token together (OLMoE), of which a tensor-parallel rank has some.

    The weight is whole on every rank: Megatron sums the gradients of ``q_layernorm`` and
    ``k_layernorm`` over the tensor-parallel group, by name, and each rank's is zero but for its own
    heads.
    """

    def __init__(self, config: TransformerConfig, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(width, dtype=config.params_dtype))
        self._group = parallel_state.get_tensor_model_parallel_group()

    def forward(self, heads: torch.Tensor) -> torch.Tensor:
        """[..., heads of this rank, head_dim] -> the same shape."""
        flat = heads.flatten(-2).float()
        squares = flat.square().sum(-1, keepdim=True)
        # the sum is of all ranks' heads, and so is its gradient
        squares = copy_to_tensor_model_parallel_region(
            reduce_from_tensor_model_parallel_region(squares)
        )
        scaled = flat * torch.rsqrt(squares / len(self.weight) + self.eps)
        weight = self.weight.chunk(self._group.size())[self._group.rank()]
        return (weight * scaled.to(heads.dtype)).view_as(heads)


class QueryNorm(_NormOverHeads):
    """Over all query heads."""

    def __init__(
        self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: object
    ) -> None:
        super().__init__(config, hidden_size * config.num_attention_heads, eps)


class KeyNorm(_NormOverHeads):
    """Over all key heads."""

    def __init__(
        self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: object
    ) -> None:
        super().__init__(config, hidden_size * config.num_query_groups, eps)
