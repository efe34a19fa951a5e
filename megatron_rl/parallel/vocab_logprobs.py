"""Log-probabilities from logits whose vocabulary is sharded over the tensor-parallel group.

Both passes work on the tokens in chunks and keep nothing of size [T, V] but the logits (in the
model's type): the backward pass computes the softmax again from the logits and the saved normaliser
[T].
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

#: Elements of fp32 working memory of a chunk (4 MiB of fp32).
CHUNK_ELEMENTS = 1 << 20


class _VocabParallelLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: torch.Tensor,
        targets: torch.Tensor,
        inverse_temperature: float,
        group: ProcessGroup,
        differentiable_entropy: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        num_tokens, shard = logits.shape
        start = group.rank() * shard
        logprobs = logits.new_empty(num_tokens, dtype=torch.float32)
        entropy = torch.empty_like(logprobs)
        normaliser = torch.empty_like(logprobs)
        for rows in _chunks(num_tokens, shard):
            x = logits[rows].float() * inverse_temperature
            peak = _reduced(x.max(dim=-1).values, dist.ReduceOp.MAX, group)
            shifted = x - peak[:, None]
            exp = shifted.exp()
            local = targets[rows] - start
            here = (local >= 0) & (local < shard)
            picked = shifted.gather(1, local.clamp(0, shard - 1)[:, None]).squeeze(1)
            sums = torch.stack([exp.sum(-1), (exp * shifted).sum(-1), picked * here])
            total, weighted, picked = _reduced(sums, dist.ReduceOp.SUM, group)
            log_total = total.log()
            logprobs[rows] = picked - log_total
            entropy[rows] = log_total - weighted / total
            normaliser[rows] = peak + log_total
        ctx.inverse_temperature, ctx.start = inverse_temperature, start
        if differentiable_entropy:
            ctx.save_for_backward(logits, targets, normaliser, entropy)
        else:
            ctx.save_for_backward(logits, targets, normaliser)
            ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    def backward(
        ctx: Any, grad_logprobs: torch.Tensor, grad_entropy: torch.Tensor
    ) -> tuple[torch.Tensor, None, None, None, None]:
        logits, targets, normaliser, *entropy = ctx.saved_tensors
        num_tokens, shard = logits.shape
        grad_logits = torch.empty_like(logits)
        for rows in _chunks(num_tokens, shard):
            scale = grad_logprobs[rows, None] * ctx.inverse_temperature
            x = logits[rows].float() * ctx.inverse_temperature
            log_p = x - normaliser[rows, None]
            if entropy:
                # d H / d x_j = -p_j (log p_j + H), and d log p_y / d x_j = [j = y] - p_j
                weight = grad_entropy[rows, None] * ctx.inverse_temperature
                factor = (log_p + entropy[0][rows, None]).mul_(weight).add_(scale).neg_()
                grad = log_p.exp_().mul_(factor)
            else:
                grad = log_p.exp_().mul_(-scale)
            local = targets[rows] - ctx.start
            here = ((local >= 0) & (local < shard))[:, None]
            grad.scatter_add_(1, local.clamp(0, shard - 1)[:, None], scale * here)
            grad_logits[rows] = grad.to(logits.dtype)
        return grad_logits, None, None, None, None


def _chunks(num_tokens: int, width: int) -> list[slice]:
    step = max(1, CHUNK_ELEMENTS // max(width, 1))
    return [slice(i, min(i + step, num_tokens)) for i in range(0, num_tokens, step)]


def _reduced(
    tensor: torch.Tensor, op: dist.ReduceOp.RedOpType, group: ProcessGroup
) -> torch.Tensor:
    if group.size() > 1:
        dist.all_reduce(tensor, op=op, group=group)
    return tensor


def vocab_logprobs(
    logits: torch.Tensor,
    targets: torch.Tensor,
    temperature: float,
    group: ProcessGroup,
    *,
    differentiable_entropy: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """log softmax(logits / temperature) at the targets, and the entropy of that distribution.

    Args:
        logits: [T, V / tp] in any floating type, this rank's slice of the vocabulary, in rank
            order. targets: int64 [T], global token ids. temperature: divides the logits; > 0.
            group: the tensor-parallel group.
        differentiable_entropy: for a loss with an entropy bonus; keeps the entropies [T] for the
            backward pass, which needs no communication and no other memory.

    Returns:
        Log-probabilities fp32 [T], differentiable in the logits, and entropies fp32 [T] in nats,
        detached unless asked otherwise.
    """
    return _VocabParallelLogprobs.apply(
        logits, targets, 1.0 / temperature, group, differentiable_entropy
    )


@torch.no_grad()
def vocab_hits(logits: torch.Tensor, targets: torch.Tensor, group: ProcessGroup) -> torch.Tensor:
    """Whether no token of the vocabulary has a larger logit than the target: bool [T].

    Arguments as in `vocab_logprobs`. A collective over the group.
    """
    num_tokens, shard = logits.shape
    start = group.rank() * shard
    hits = torch.empty(num_tokens, dtype=torch.bool, device=logits.device)
    for rows in _chunks(num_tokens, shard):
        local = targets[rows] - start
        here = (local >= 0) & (local < shard)
        picked = logits[rows].gather(1, local.clamp(0, shard - 1)[:, None]).squeeze(1)
        of_target = torch.where(here, picked, float("-inf"))
        peak = logits[rows].max(dim=-1).values
        peak, of_target = _reduced(torch.stack([peak, of_target]), dist.ReduceOp.MAX, group)
        hits[rows] = of_target >= peak
    return hits
