"""One forward pass of a model chunk over a row of tokens."""

from __future__ import annotations

from typing import Sequence

import torch
import torch.distributed as dist
from megatron.core.transformer.module import MegatronModule

from megatron_rl.models.attention import Placement
from megatron_rl.parallel.groups import Groups


def forward_row(
    model: torch.nn.Module,
    tokens: torch.Tensor,
    placement: Placement,
    *,
    to_hidden: bool = False,
) -> torch.Tensor:
    """Run one chunk.

    Args:
        model: a GPTModel chunk, bare or wrapped for data parallelism.
        tokens: int64 [T], this context-parallel rank's.
        placement: where they stand.
        to_hidden: on the last stage too, stop before the output layer (`gpt.chunk.head_of`).

    Returns:
        On the last stage logits [1, T, V / tp] in the model's type (fp32 with model.fp32_head),
        elsewhere, and with ``to_hidden``, hidden states [T / tp, 1, D].
    """
    # What the routers leave out, or how often they count each token: see `models.router`.
    mask = placement.padding if placement.counts is None else placement.counts
    return model(
        input_ids=tokens[None],
        position_ids=placement.positions[None],
        attention_mask=None,
        packed_seq_params=placement,
        padding_mask=None if mask is None else mask[None],
        to_hidden=to_hidden,
    )


@torch.no_grad()
def forward_stages(
    chunks: Sequence[MegatronModule],
    tokens: torch.Tensor,
    placement: Placement,
    groups: Groups,
    *,
    to_hidden: bool = False,
) -> torch.Tensor | None:
    """Run a row through all pipeline stages, one after the other, without gradients.

    Returns:
        Logits [T, V / tp] on the last stage, or with ``to_hidden`` hidden states [T / tp, 1, D];
        None on the others.
    """
    stage, stages = groups.pipeline.rank(), groups.pipeline.size()
    if stages == 1 and len(chunks) == 1:
        only = forward_row(chunks[0], tokens, placement, to_hidden=to_hidden)
        return only if to_hidden else only.squeeze(0)
    config = chunks[0].config
    rows = len(tokens) // (groups.tensor.size() if config.sequence_parallel else 1)
    shape = (rows, 1, config.hidden_size)
    output: torch.Tensor | None = None
    for virtual, chunk in enumerate(chunks):
        if stage > 0 or virtual > 0:
            source = dist.get_global_rank(groups.pipeline, (stage - 1) % stages)
            hidden = torch.empty(shape, dtype=config.pipeline_dtype, device=tokens.device)
            dist.recv(hidden, src=source, group=groups.pipeline)
            chunk.set_input_tensor(hidden)
        output = forward_row(chunk, tokens, placement, to_hidden=to_hidden)
        if stage < stages - 1 or virtual < len(chunks) - 1:
            target = dist.get_global_rank(groups.pipeline, (stage + 1) % stages)
            dist.send(output.contiguous(), dst=target, group=groups.pipeline)
            output = None
    return output if output is None or to_hidden else output.squeeze(0)
