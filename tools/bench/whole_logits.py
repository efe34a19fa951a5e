"""The head with whole logits [T, V]: the reference that `head.py` measures the tiles against.

A product, then log-probabilities and entropies in chunks of tokens with a backward pass of its own.
Besides the logits only their gradient has size [T, V].
"""

from __future__ import annotations

from typing import Any

import torch

#: Elements of fp32 working memory of a chunk.
CHUNK_ELEMENTS = 1 << 20


def whole_logits(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities fp32 [T] of the targets and entropies [T], detached.

    Args:
        hidden: [T, D]. weight: [V, D]. targets: int64 [T]. temperature: divides the logits.
    """
    return WholeLogits.apply(hidden @ weight.t(), targets, 1.0 / temperature)


class WholeLogits(torch.autograd.Function):
    """(logits [T, V], targets, 1 / temperature) -> log-probabilities, entropies."""

    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, targets: torch.Tensor, inverse: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        logprobs = logits.new_empty(len(logits), dtype=torch.float32)
        entropy, normaliser = torch.empty_like(logprobs), torch.empty_like(logprobs)
        for rows in _chunks(*logits.shape):
            x = logits[rows].float() * inverse
            peak = x.max(dim=-1).values
            shifted = x - peak[:, None]
            exp = shifted.exp()
            total, weighted = exp.sum(-1), (exp * shifted).sum(-1)
            log_total = total.log()
            logprobs[rows] = shifted.gather(1, targets[rows, None]).squeeze(1) - log_total
            entropy[rows] = log_total - weighted / total
            normaliser[rows] = peak + log_total
        ctx.inverse = inverse
        ctx.save_for_backward(logits, targets, normaliser)
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    def backward(
        ctx: Any, grad_logprobs: torch.Tensor, _: torch.Tensor
    ) -> tuple[torch.Tensor, None, None]:
        logits, targets, normaliser = ctx.saved_tensors
        grad_logits = torch.empty_like(logits)
        for rows in _chunks(*logits.shape):
            scale = grad_logprobs[rows, None] * ctx.inverse
            x = logits[rows].float() * ctx.inverse
            grad = (x - normaliser[rows, None]).exp_().mul_(-scale)
            grad.scatter_add_(1, targets[rows, None], scale)
            grad_logits[rows] = grad.to(logits.dtype)
        return grad_logits, None, None


def _chunks(num_tokens: int, width: int) -> list[slice]:
    step = max(1, CHUNK_ELEMENTS // max(width, 1))
    return [slice(i, min(i + step, num_tokens)) for i in range(0, num_tokens, step)]
