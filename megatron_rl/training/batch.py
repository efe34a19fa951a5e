"""From samples to packs on the device: the same packs serve scoring and update."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Sequence

import torch

from megatron_rl.config.schema import Config
from megatron_rl.data.packing import pack_samples, plan_packs, round_up
from megatron_rl.models.attention import PackedLayout, packed_layout
from megatron_rl.parallel.collectives import all_max
from megatron_rl.parallel.groups import Groups
from megatron_rl.records import Pack, Sample


@dataclass(frozen=True)
class PackTensors:
    """A pack as tensors on the device, with the layout the model wants. Shapes as in
    `records.Pack`.
    """

    tokens: torch.Tensor
    targets: torch.Tensor
    mask: torch.Tensor
    sequence_ids: torch.Tensor
    num_sequences: int
    advantages: torch.Tensor
    rollout_logprobs: torch.Tensor | None
    layout: PackedLayout


def to_device(pack: Pack, device: torch.device) -> PackTensors:
    """Copy a pack to the device and lay out its sequences."""

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
        layout=packed_layout(pack.lengths, pack.num_tokens, device),
    )


def pack_mini_batches(
    mini_batches: Sequence[Sequence[Sample]], config: Config, groups: Groups, device: torch.device
) -> list[list[PackTensors]]:
    """Pack each mini-batch of this rank; all ranks get equally many packs of equal length. A
    collective.

    Packs are as long as the largest mini-batch of any rank needs in one piece, ``data.pack_tokens``
    at most, rounded up to ``data.pack_multiple``. Ranks with less to do are given empty packs, and
    so are all ranks until the interleaved schedule can deal its packs out evenly over the pipeline
    stages.
    """
    multiple = config.data.pack_multiple
    needed = max(sum(len(sample.tokens) for sample in batch) for batch in mini_batches)
    needed = all_max(needed, groups.data_context, device)
    length = min(round_up(needed, multiple), config.data.pack_tokens)
    counts = [len(plan_packs([len(s.tokens) for s in batch], length)) for batch in mini_batches]
    num_packs = all_max(max(counts), groups.data_context, device)
    if groups.virtual_stages:
        num_packs = round_up(num_packs, groups.pipeline_stages)
    return [
        [
            to_device(pack, device)
            for pack in pack_samples(
                batch, length, num_packs=num_packs, vocab_size=config.model.vocab_size
            )
        ]
        for batch in mini_batches
    ]
