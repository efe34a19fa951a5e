"""Run a pack through a model chunk, and turn its logits into values of the whole row.

Context-parallel ranks that share a pack each run the model on their own tokens. This module gathers
the small [T] results, so that every rank computes losses on whole sequences.
"""

from __future__ import annotations

import torch

from megatron_rl.models.forward import forward_row
from megatron_rl.parallel.groups import Groups
from megatron_rl.parallel.vocab_logprobs import vocab_hits, vocab_logprobs
from megatron_rl.policy.batch import PackTensors


def forward_pack(model: torch.nn.Module, pack: PackTensors) -> torch.Tensor:
    """Run one chunk on this rank's tokens of the pack; see `forward_row`."""
    return forward_row(model, pack.shards.local(pack.tokens), pack.placement)


def pack_logprobs(
    logits: torch.Tensor,
    pack: PackTensors,
    temperature: float,
    groups: Groups,
    *,
    differentiable_entropy: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities of the pack's targets, and entropies. A collective.

    Args:
        logits: [1, T / context, V / tp], of this rank's tokens. temperature: divides them.

    Returns:
        fp32 [T], differentiable in the logits, and entropies fp32 [T] in nats, detached unless
        asked otherwise.
    """
    logprobs, entropy = vocab_logprobs(
        logits.squeeze(0),
        pack.shards.local(pack.targets),
        temperature,
        groups.tensor,
        differentiable_entropy=differentiable_entropy,
    )
    return pack.shards.whole(logprobs), pack.shards.whole(entropy)


def pack_hits(logits: torch.Tensor, pack: PackTensors, groups: Groups) -> torch.Tensor:
    """Whether each target of the pack is the model's likeliest token, bool [T]. A collective."""
    hits = vocab_hits(logits.squeeze(0), pack.shards.local(pack.targets), groups.tensor)
    return pack.shards.whole(hits.float()) > 0.5
