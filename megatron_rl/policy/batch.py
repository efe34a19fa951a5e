"""From samples to packs on the device: the same packs serve scoring and update."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Mapping, Sequence

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from megatron_rl.algorithms.distance_rules import distance_rule
from megatron_rl.config.layout import moe_layers, stage_layers
from megatron_rl.config.schema import Config
from megatron_rl.data.packed_routes import Routing
from megatron_rl.data.packing import PackPlans, pack_samples
from megatron_rl.data.shared_prompts import round_up
from megatron_rl.models.attention import Placement, packed_placement
from megatron_rl.models.build import shares_prompts
from megatron_rl.models.context_attention import context_placement
from megatron_rl.models.shared_attention import shared_placement
from megatron_rl.parallel.collectives import all_max, all_reduce
from megatron_rl.parallel.groups import Groups
from megatron_rl.parallel.kept_words import KeptWords
from megatron_rl.parallel.sequence_shards import (
    SequenceShards,
    padded_spans,
    sequence_multiple,
    sequence_shards,
    tensor_slice,
)
from megatron_rl.policy.pack_length import shortest_length
from megatron_rl.policy.predicting import kept_words, predicting
from megatron_rl.policy.shared_rows import SharedRows, row_counts, shared_rows
from megatron_rl.records import Pack, Sample
from megatron_rl.router.trace import LayerTrace, RouterTrace


@dataclass(frozen=True)
class PackTensors:
    """A pack as tensors on the device: the whole row on every context-parallel rank, shapes as in
    `records.Pack`, and the placement of the part that this rank's model runs on. R_local are the
    rows of that part, T_local without shared prompts.
    """

    tokens: torch.Tensor
    targets: torch.Tensor
    mask: torch.Tensor
    sequence_ids: torch.Tensor
    num_sequences: int
    members: tuple[int, ...]  #: places of the sequences in the list that was packed
    advantages: torch.Tensor
    rollout_logprobs: torch.Tensor | None
    shards: SequenceShards  #: which rows that part is
    placement: Placement
    #: the sampler's experts of this rank's tokens and layers, in host memory: global layer number
    #: (from 1) -> integers [R_local, K]; None: not replayed
    routes: Mapping[int, torch.Tensor] | None = None
    #: bool [R_local], in host memory: the tokens whose experts are known; None: all
    routes_known: torch.Tensor | None = None
    #: the sampler's router trace of this rank's tokens and layers, in host memory; None: not known
    trace: RouterTrace | None = None
    #: int64, which of this rank's predictions (of its rows, then the extra ones of shared rows) are
    #: trained, ascending; None: nearly all, or not known
    predicting: torch.Tensor | None = None
    shared: SharedRows | None = None  #: None: no prompt is shared, the model runs on ``tokens``
    kept: KeptWords | None = None  #: of the predictions ``predicting``; None: every token

    @property
    def row(self) -> torch.Tensor:
        """int64 [R], the tokens that the model runs on."""
        return self.tokens if self.shared is None else self.shared.tokens

    @property
    def trained_rows(self) -> torch.Tensor:
        """[R_local of this context rank], how many trained predictions each row stands for; bool
        where prompts are not shared.
        """
        return self.shards.local(self.mask if self.shared is None else self.shared.trained)

    def of_tokens(self, rows: torch.Tensor) -> torch.Tensor:
        """Values [R] of the row -> [T] of the pack's tokens."""
        return rows if self.shared is None else rows.index_select(0, self.shared.places)


def to_device(
    pack: Pack, device: torch.device, context: ProcessGroup, tensor_group: ProcessGroup
) -> PackTensors:
    """Copy a pack to the device and cut its sequences for the context-parallel ranks."""
    lengths, parents = pack.segments
    spans = padded_spans(lengths, pack.num_rows, pack.sequence_multiple)
    shards = sequence_shards(spans, context, device)
    placement: Placement
    if pack.sequence_multiple > 1:
        placement = context_placement(lengths, spans, shards, device, parents)
    elif pack.shared is not None:
        placement = shared_placement(lengths, parents, pack.num_rows, device)
    else:
        placement = packed_placement(lengths, pack.num_rows, device)
    placement.counts = row_counts(pack, shards, device)

    def tensor(array: np.ndarray | None) -> Any:
        return None if array is None else torch.from_numpy(array).to(device)

    routes, known, trace = _local_routes(pack, shards, tensor_group)
    shared = shared_rows(pack, shards, device)
    trained = predicting(pack, shards, shared)
    return PackTensors(
        tokens=tensor(pack.tokens),
        targets=tensor(pack.targets),
        mask=tensor(pack.mask),
        sequence_ids=tensor(pack.sequence_ids),
        num_sequences=pack.num_sequences,
        members=pack.members,
        advantages=tensor(pack.advantages),
        rollout_logprobs=tensor(pack.rollout_logprobs),
        shards=shards,
        placement=placement,
        routes=routes,
        routes_known=known,
        trace=trace,
        predicting=None if trained is None else tensor(np.flatnonzero(trained >= 0)),
        shared=shared,
        kept=None if trained is None else kept_words(pack, trained, device),
    )


def _local_routes(
    pack: Pack, shards: SequenceShards, tensor_group: ProcessGroup
) -> tuple[dict[int, torch.Tensor] | None, torch.Tensor | None, RouterTrace | None]:
    """The sampler's experts for the tokens that this rank's routers will see, and a mask of the
    tokens whose experts are known; or the sampler's router trace of these tokens, if the pack has
    log-probabilities of experts.
    """
    routed = pack.routed_experts
    if routed is None:
        return None, None, None
    rows = shards.rows.cpu()

    def local(array: np.ndarray) -> torch.Tensor:
        return tensor_slice(torch.from_numpy(array)[rows], tensor_group)

    ids = local(routed.ids)
    if routed.logprobs is not None:
        logprobs = local(routed.logprobs)
        trace = {
            layer: LayerTrace(ids[:, i].contiguous(), logprobs[:, i].contiguous())
            for i, layer in enumerate(routed.layers)
        }
        return None, None, trace
    routes = {layer: ids[:, i].contiguous() for i, layer in enumerate(routed.layers)}
    return routes, None if routed.known is None else local(routed.known), None


def replayed_routing(
    config: Config, groups: Groups, *, with_traces: bool = False
) -> Routing | None:
    """The sampler's experts that this rank's packs hold; None: they are neither replayed nor taken
    as the router trace (``with_traces``).
    """
    if config.algorithm.routing_replay != "r3" and not with_traces:
        return None
    model, is_moe = config.model, moe_layers(config.model)
    stage = stage_layers(model.num_layers, config.parallel)[groups.pipeline.rank()]
    layers = tuple(layer + 1 for layer in sorted(stage) if is_moe[layer])
    every = distance_rule(config.algorithm.router_shift.distance).every_expert
    count = model.num_experts if every else model.moe_top_k
    return Routing(layers, model.moe_top_k, model.num_experts, count if with_traces else 0)


def pack_mini_batches(
    mini_batches: Sequence[Sequence[Sample]],
    config: Config,
    groups: Groups,
    device: torch.device,
    *,
    with_traces: bool = False,
) -> list[list[PackTensors]]:
    """Pack each mini-batch of this rank; all ranks get equally many packs of equal length. A
    collective.

    Packs are long enough to hold the largest mini-batch of any rank in one pack, at most
    ``data.pack_tokens``, rounded up to ``data.pack_multiple``. Where it takes several, they are as
    short as their number allows (see `shortest_length`), but not with a balancing loss, which
    depends on what shares a pack: lengths follow the layout's padding. With context parallelism
    each sequence (with shared prompts, each prompt and each answer) is padded to a multiple of 2 x
    context tokens. Ranks with less to do are given empty packs, and so are all ranks until the
    interleaved schedule can deal its packs out evenly over the pipeline stages. ``with_traces``:
    the packs hold the sampler's router trace, which all samples have; not with R3.
    """
    options: dict[str, Any] = {
        "sequence_multiple": sequence_multiple(groups.context.size()),
        "routing": replayed_routing(config, groups, with_traces=with_traces),
        "share_prompts": shares_prompts(config, device),
    }
    plans = [PackPlans(batch, **options) for batch in mini_batches]
    last_stage = groups.pipeline.rank() == groups.pipeline.size() - 1  # the others have no head
    # A rank without a sequence cannot see whether the others' packs hold these.
    found = any(s.rollout_logprobs is not None for batch in mini_batches for s in batch)
    most = torch.tensor([max(plan.rows for plan in plans), int(found)], device=device)
    rows, with_rollout_logprobs = all_reduce(most, groups.data_context, dist.ReduceOp.MAX).tolist()
    length, num_packs = _pack_size(plans, rows, config, groups, device)
    return [
        [
            to_device(pack, device, groups.context, groups.tensor)
            for pack in pack_samples(
                batch,
                length,
                num_packs=num_packs,
                vocab_size=config.model.vocab_size,
                with_rollout_logprobs=bool(with_rollout_logprobs),
                plans=plan,
                with_kept=last_stage,
                **options,
            )
        ]
        for batch, plan in zip(mini_batches, plans, strict=True)
    ]


def _pack_size(
    plans: Sequence[PackPlans], rows: int, config: Config, groups: Groups, device: torch.device
) -> tuple[int, int]:
    """Tokens of a pack, and packs of a mini-batch: the same on all ranks. A collective.

    Args:
        plans: of this rank's mini-batches.
        rows: of the largest mini-batch of any rank.
        config, groups, device: as of `pack_mini_batches`.
    """
    length, num_packs = round_up(rows, config.data.pack_multiple), min(rows, 1)
    if length > config.data.pack_tokens:
        length = config.data.pack_tokens
        counts = [len(plan.of(length)) for plan in plans]
        num_packs = all_max(max(counts), groups.data_context, device)
    if groups.virtual_stages:
        num_packs = round_up(num_packs, groups.pipeline_stages)
    if num_packs > 1 and not config.model.aux_loss_coeff:
        length = shortest_length(
            lambda length: max(len(plan.of(length)) for plan in plans),
            longest=max(plan.longest for plan in plans),
            least=-(-rows // num_packs),
            most=length,
            multiple=config.data.pack_multiple,
            num_packs=num_packs,
            ranks=groups.data_context,
            device=device,
        )
    return length, num_packs
