"""Run a pack through a model chunk, and turn its logits into values of the whole row.

Context-parallel ranks that share a pack each run the model on their own tokens. This module gathers
the small [T] results, so that every rank computes losses on whole sequences.
"""

from __future__ import annotations

import functools
from typing import Callable

import torch

from megatron_rl.models.forward import forward_row
from megatron_rl.parallel.groups import Groups
from megatron_rl.parallel.vocab_logprobs import vocab_hits, vocab_logprobs
from megatron_rl.policy.batch import PackTensors


def forward_pack(model: torch.nn.Module, pack: PackTensors) -> torch.Tensor:
    """Run one chunk on this rank's tokens of the pack; see `forward_row`."""
    return forward_row(model, pack.shards.local(pack.row), pack.placement)


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
        logits: [1, R / context, V / tp], of this rank's rows. temperature: divides them.

    Returns:
        fp32 [T], differentiable in the logits, and entropies fp32 [T] in nats, detached unless
        asked otherwise.
    """
    read = functools.partial(
        vocab_logprobs,
        temperature=temperature,
        group=groups.tensor,
        differentiable_entropy=differentiable_entropy,
    )
    logprobs, entropy = _predictions(logits.squeeze(0), pack, read)
    return logprobs, entropy


def pack_hits(logits: torch.Tensor, pack: PackTensors, groups: Groups) -> torch.Tensor:
    """Whether each target of the pack is the model's likeliest token, bool [T]. A collective."""

    def read(rows: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor]:
        return (vocab_hits(rows, targets, groups.tensor).float(),)

    (hits,) = _predictions(logits.squeeze(0), pack, read)
    return hits > 0.5


def _predictions(
    rows: torch.Tensor,
    pack: PackTensors,
    read: Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, ...]],
) -> list[torch.Tensor]:
    """What ``read`` makes of rows [n, V / tp] and their targets [n], for the whole pack, each [T].
    A collective.
    """
    shards, shared = pack.shards, pack.shared
    if shared is None:
        return [shards.whole(values) for values in read(rows, shards.local(pack.targets))]
    own = read(rows, shards.local(shared.targets))
    extra = read(rows.index_select(0, shared.extra_rows), shared.extra_targets)
    return [shared.predictions(*values, shards) for values in zip(own, extra, strict=True)]
