"""Run a pack through a model chunk, and turn its hidden states into values of the whole row.

Context-parallel ranks that share a pack each run the model on their own tokens. This module gathers
the small [T] results, so that every rank computes losses on whole sequences.
"""

from __future__ import annotations

import torch

from megatron_rl.models.forward import forward_row
from megatron_rl.models.gpt.chunk import head_of
from megatron_rl.parallel.vocab_head import Entropy, HeadValues, VocabHead, head_values
from megatron_rl.policy.batch import PackTensors
from megatron_rl.policy.policy import Policy


def forward_pack(model: torch.nn.Module, pack: PackTensors) -> torch.Tensor:
    """Run one chunk on this rank's rows of the pack: hidden states [R_local, 1, D], of the last
    chunk before the output layer; see `forward_row`.
    """
    return forward_row(model, pack.shards.local(pack.row), pack.placement, to_hidden=True)


def pack_values(
    policy: Policy,
    hidden: torch.Tensor,
    pack: PackTensors,
    temperature: float,
    *,
    entropy: Entropy = "none",
) -> HeadValues:
    """Log-probabilities of the pack's targets, entropies, and whether each target is the model's
    likeliest token; see `head_values`. Where the sampler kept only some tokens, all of these are of
    the distribution over them. A collective on the last stage.

    Args:
        policy: the policy.
        hidden: [R_local, 1, D], of `forward_pack`.
        pack: the pack.
        temperature: divides the logits.
        entropy: whether to compute entropies, and whether with gradients.

    Returns:
        Values of the whole row, [T]; of tokens whose prediction is not trained these, or 0.
    """
    head, shards, shared = head_of(policy.chunks[-1]), pack.shards, pack.shared
    rows = head.gather(hidden)
    if shared is None:
        targets = shards.local(pack.targets)
    else:  # a row may predict several tokens: its own, then the extra ones
        targets = torch.cat([shards.local(shared.targets), shared.extra_targets])
        rows = torch.cat([rows, rows.index_select(0, shared.extra_rows)])
    local = _trained_values(rows, head, targets, temperature, entropy, pack)
    if shared is None and shards.group.size() == 1:
        return local
    spread = local.logprobs.detach() if local.entropy is None else local.entropy
    columns = torch.stack([local.logprobs, spread, local.hits.float()], dim=1)
    if shared is None:
        columns = shards.whole(columns)
    else:
        own, extra = columns.split([len(columns) - len(shared.extra_rows), len(shared.extra_rows)])
        columns = shared.predictions(own, extra, shards)
    logprobs, spread, hits = columns.unbind(1)
    if entropy != "differentiable":
        spread = spread.detach()
    return HeadValues(logprobs, None if local.entropy is None else spread, hits > 0.5)


def _trained_values(
    rows: torch.Tensor,
    head: VocabHead,
    targets: torch.Tensor,
    temperature: float,
    entropy: Entropy,
    pack: PackTensors,
) -> HeadValues:
    """As `head_values`, but of rows [N, D] and targets [N] only those that the pack trains, if it
    names them; others are 0.
    """
    places = pack.predicting
    if places is None:
        return head_values(rows, head, targets, temperature, entropy=entropy)
    rows, targets, count = rows.index_select(0, places), targets.index_select(0, places), len(rows)
    found = head_values(rows, head, targets, temperature, entropy=entropy, kept=pack.kept)

    def spread(values: torch.Tensor) -> torch.Tensor:
        return values.new_zeros(count).index_copy(0, places, values)

    return HeadValues(
        spread(found.logprobs),
        None if found.entropy is None else spread(found.entropy),
        spread(found.hits),
    )
