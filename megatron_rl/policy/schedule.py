"""Runs Megatron's pipeline schedule over the packs of a mini-batch."""

from __future__ import annotations

from typing import Any, Callable, Iterator, Sequence

from megatron.core.pipeline_parallel import get_forward_backward_func

from megatron_rl.policy.batch import PackTensors
from megatron_rl.policy.policy import Policy

#: (chunk index, wrapped chunk, pack index) -> (model output, function of it that gives the loss).
ForwardStep = Callable[[int, Any, int], tuple[Any, Callable[..., Any]]]


def run_schedule(
    policy: Policy,
    packs: Sequence[PackTensors],
    forward_step: ForwardStep,
    *,
    forward_only: bool,
    measures_shift: bool = False,
) -> list[Any]:
    """Run every pack forward (and backward) through the pipeline.

    Args:
        policy: the policy.
        packs: as long as each other.
        forward_step: runs a chunk on a pack.
        forward_only: without gradients.
        measures_shift: chunks send running distances behind their activations (`DistanceRelay`).

    Returns:
        On the last stage: the loss function's report for each pack, in order. Elsewhere: an empty
        list.
    """

    def step(iterator: Iterator[int], model: Any) -> tuple[Any, Callable[..., Any]]:
        return forward_step(policy.chunk_index(model), model, next(iterator))

    iterators = [iter(range(len(packs))) for _ in policy.wrapped]
    single = len(policy.wrapped) == 1
    length = len(packs[0].row)
    parts = policy.groups.tensor_context.size()  # that a row is cut into
    behind = policy.relay.rows_behind(length // parts) if measures_shift else 0
    with policy.exchange.in_pass(len(packs), length, forward_only=forward_only):
        return get_forward_backward_func()(
            forward_step_func=step,
            data_iterator=iterators[0] if single else iterators,
            model=policy.wrapped[0] if single else list(policy.wrapped),
            num_microbatches=len(packs),
            seq_length=length + behind * parts,
            micro_batch_size=1,
            forward_only=forward_only,
        )
