"""The forward pass that measures how far the routers have moved, and the weight gamma."""

from __future__ import annotations

import contextlib
from typing import Any, Callable, Sequence

import torch

from megatron_rl.algorithms.router_shift import acting_sum, shift_weight
from megatron_rl.config.algorithm import uses_router_shift
from megatron_rl.models.gpt.chunk import cut_input
from megatron_rl.parallel.collectives import all_reduce, gather_first_dim
from megatron_rl.parallel.sequence_shards import tensor_slice
from megatron_rl.policy.batch import PackTensors
from megatron_rl.policy.pass_over_pack import forward_pack
from megatron_rl.policy.policy import Policy
from megatron_rl.policy.schedule import run_schedule
from megatron_rl.policy.score import ScoredPack
from megatron_rl.router.telemetry import RouterTelemetry
from megatron_rl.router.trace import RouterTrace, on_device


def forward_compared(
    policy: Policy,
    chunk: int,
    model: torch.nn.Module,
    item: ScoredPack,
    telemetry: RouterTelemetry | None,
    layer_penalty: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Run a chunk on a pack: its output, and on the last one the distance of all layers, [R_local].

    The distance is None on other chunks and without router shift, and 0 where the pack's scores are
    this pass's own. With routing replay the routers use the experts of the trace. The telemetry
    counts in every case. Where the distance has no gradient (over stages, since the relay carries
    none, and with recomputed layers) ``layer_penalty``, 0-d, is what a layer's distance of a
    trained token costs in the loss's sum; its gradient is added at the routers. With router shift
    run the schedule with ``measures_shift``.
    """
    pack, algorithm = item.pack, policy.config.algorithm
    weights = tensor_slice(pack.trained_rows, policy.groups.tensor)
    trace = None
    if item.traces:
        trace = on_device(item.traces[chunk], policy.device.torch_device)
    own = item.own.traces[chunk] if item.own is not None and item.own.traces else None
    relay, relays = policy.relay, uses_router_shift(algorithm)
    before = None  # of the layers in front of the chunk
    if relays and not relay.is_first(chunk):
        behind = cut_input(policy.chunks[chunk], len(weights))
        before = relay.read(behind, chunk, len(weights))
    with (
        contextlib.nullcontext() if item.own is not None else _replayed(policy, chunk, trace),
        policy.capture.compare(chunk, trace, weights, telemetry, own, layer_penalty) as distances,
    ):
        output = forward_pack(model, pack)
    if own is not None and algorithm.trace_store == "pinned":
        own.update({number: layer.pinned() for number, layer in own.items()})
    if not relays:
        return output, None
    running = relay.join(before, distances())
    if relay.ends_at(chunk):
        return output, relay.rule.total(running)
    return relay.put(output, running), None


def _replayed(
    policy: Policy, chunk: int, trace: RouterTrace | None
) -> contextlib.AbstractContextManager[None]:
    if policy.replay is None:
        return contextlib.nullcontext()
    assert trace is not None, "routing replay needs traces"
    return policy.replay.routes(chunk, {n: layer.expert_ids for n, layer in trace.items()})


def finish_pass(policy: Policy) -> None:
    """Call after a schedule: all that its passes have left for recomputations is done.

    Raises:
        RouterError: a router was not recomputed as often as it ran.
    """
    try:
        policy.capture.finish()
    finally:
        if policy.replay is not None:
            policy.replay.finish()


def gamma_of(
    policy: Policy, pack: PackTensors, distance: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The weight gamma~ of a pack's tokens and the distance in its exponent, both [T], the latter
    with its gradient if it has one. A collective.

    distance: [R_local], of all layers.
    """
    distance = pack.shards.whole(gather_first_dim(distance, policy.groups.tensor))
    distance = pack.of_tokens(distance)
    layers = policy.relay.rule.divisor(policy.num_moe_layers)
    shift = policy.config.algorithm.router_shift
    gamma = shift_weight(distance, layers, shift.floor, attached=not shift.stop_gradient)
    return gamma, distance / layers


@torch.no_grad()
def gamma_mean(policy: Policy, scored: Sequence[ScoredPack]) -> torch.Tensor:
    """The mean of gamma~ over the tokens of the mini-batch that it acts on, 0-d. A collective.

    The loss of the first pack needs this mean, which is known only after the last pack's forward
    pass on the last rank. So all packs go forward an extra time, without gradients. It is 1 on
    other stages than the last, if gamma~ acts on no token, and for packs that are not scored yet.
    """
    mode = policy.config.algorithm.router_shift.mode
    device = policy.device.torch_device
    if any(item.own is not None for item in scored):  # all of them, on every rank
        return torch.ones((), dtype=torch.float64, device=device)
    sums = [torch.zeros(2, dtype=torch.float64, device=device)]

    def forward_step(chunk: int, model: Any, index: int) -> tuple[Any, Callable[..., Any]]:
        item = scored[index]
        output, distance = forward_compared(policy, chunk, model, item, None)

        def keep(hidden: torch.Tensor) -> tuple[torch.Tensor, None]:
            assert distance is not None, "of a loss with router shift"
            gamma, _ = gamma_of(policy, item.pack, distance)
            sums.append(torch.stack(acting_sum(gamma, item.pack.advantages, item.pack.mask, mode)))
            return torch.zeros((), device=hidden.device), None

        return output, keep

    packs = [item.pack for item in scored]
    run_schedule(policy, packs, forward_step, forward_only=True, measures_shift=True)
    finish_pass(policy)
    total, count = all_reduce(torch.stack(sums).sum(0), policy.groups.data)
    return torch.where(count > 0.5, total / count.clamp(min=1.0), 1.0)
