"""From samples to packs on the device: the same packs serve scoring and update."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Sequence

import torch
from torch.distributed import ProcessGroup

from megatron_rl.config.schema import Config
from megatron_rl.data.packing import pack_samples, plan_packs, round_up
from megatron_rl.models.attention import Layout, packed_layout
from megatron_rl.models.context_attention import context_layout
from megatron_rl.parallel.collectives import all_max
from megatron_rl.parallel.groups import Groups
from megatron_rl.parallel.sequence_shards import (
    SequenceShards,
    padded_spans,
    sequence_multiple,
    sequence_shards,
)
from megatron_rl.records import Pack, Sample


@dataclass(frozen=True)
class PackTensors:
    """A pack as tensors on the device: the whole row on every context-parallel rank, shapes as in
    `records.Pack`, and the layout of the part that this rank's model runs on.
    """

    tokens: torch.Tensor
    targets: torch.Tensor
    mask: torch.Tensor
    sequence_ids: torch.Tensor
    num_sequences: int
    advantages: torch.Tensor
    rollout_logprobs: torch.Tensor | None
    shards: SequenceShards  #: which rows that part is
    layout: Layout


def to_device(pack: Pack, device: torch.device, context: ProcessGroup) -> PackTensors:
    """Copy a pack to the device, spread it over the context-parallel ranks and lay out its
    sequences.
    """
    spans = padded_spans(pack.lengths, pack.num_tokens, pack.sequence_multiple)
    shards = sequence_shards(spans, context, device)
    if pack.sequence_multiple > 1:
        layout = context_layout(pack.lengths, spans, shards, device)
    else:
        layout = packed_layout(pack.lengths, pack.num_tokens, device)

    def tensor(array):
        return None if array is None else torch.from_numpy(array).to(device)

    return PackTensors(
        tokens=tensor(pack.tokens),
        targets=tensor(pack.targets),
        mask=tensor(pack.mask),
        sequence_ids=tensor(pack.sequence_ids),
        num_sequences=pack.num_sequences,
        advantages=tensor(pack.advantages),
        rollout_logprobs=tensor(pack.rollout_logprobs),
        shards=shards,
        layout=layout,
    )


def pack_mini_batches(
    mini_batches: Sequence[Sequence[Sample]], config: Config, groups: Groups, device: torch.device
) -> list[list[PackTensors]]:
    """Pack each mini-batch of this rank; all ranks get equally many packs of equal length. A
    collective.

    Packs are as long as the largest mini-batch of any rank needs in one piece, ``data.pack_tokens``
    at most, rounded up to ``data.pack_multiple``. With context parallelism each sequence is padded
    to a multiple of 2 x context tokens. Ranks with less to do are given empty packs, and so are all
    ranks until the interleaved schedule can deal its packs out evenly over the pipeline stages.
    """
    multiple = sequence_multiple(groups.context.size())
    lengths = [[round_up(len(s.tokens), multiple) for s in batch] for batch in mini_batches]
    needed = all_max(max(map(sum, lengths)), groups.data_context, device)
    length = min(round_up(needed, config.data.pack_multiple), config.data.pack_tokens)
    counts = [len(plan_packs(batch, length)) for batch in lengths]
    num_packs = all_max(max(counts), groups.data_context, device)
    if groups.virtual_stages:
        num_packs = round_up(num_packs, groups.pipeline_stages)
    # A rank without a sequence cannot see whether the others' packs carry these.
    found = any(s.rollout_logprobs is not None for batch in mini_batches for s in batch)
    with_rollout_logprobs = bool(all_max(int(found), groups.data_context, device))
    return [
        [
            to_device(pack, device, groups.context)
            for pack in pack_samples(
                batch,
                length,
                num_packs=num_packs,
                vocab_size=config.model.vocab_size,
                with_rollout_logprobs=with_rollout_logprobs,
                sequence_multiple=multiple,
            )
        ]
        for batch in mini_batches
    ]
