"""The forward pass that measures how far the routers have moved, and the weight it gives."""

from __future__ import annotations

from typing import Sequence

import torch

from megatron_rl.algorithms.router_shift import acting_sum, layer_divisor, shift_weight
from megatron_rl.config.algorithm import uses_router_shift
from megatron_rl.parallel.collectives import all_reduce, gather_first_dim
from megatron_rl.parallel.sequence_shards import tensor_slice
from megatron_rl.router.telemetry import RouterTelemetry
from megatron_rl.training.batch import PackTensors
from megatron_rl.training.pass_over_pack import forward_pack
from megatron_rl.training.policy import Policy
from megatron_rl.training.schedule import run_schedule
from megatron_rl.training.score import ScoredPack


def forward_compared(
    policy: Policy,
    chunk: int,
    model: torch.nn.Module,
    item: ScoredPack,
    telemetry: RouterTelemetry,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Run a chunk on a pack: its output, and on the last one the distance of all layers [T_local].

    None instead of the distance on other chunks, and without router shift.
    """
    pack, algorithm = item.pack, policy.config.algorithm
    if not uses_router_shift(algorithm):
        return forward_pack(model, pack), None
    mask = tensor_slice(pack.shards.local(pack.mask), policy.groups.tensor)
    layers = algorithm.router_shift.layers
    trace = item.traces[chunk]
    with policy.capture.compare(chunk, trace, mask, telemetry, layers) as distance:
        output = forward_pack(model, pack)
    return output, policy.relay.pass_on(chunk, distance())


def gamma_of(
    policy: Policy, pack: PackTensors, distance: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The weight gamma~ of a pack's tokens and the distance in its exponent, [T]. A collective.

    distance: [T_local], of all layers.
    """
    shift = policy.config.algorithm.router_shift
    distance = pack.shards.whole(gather_first_dim(distance, policy.groups.tensor))
    layers = layer_divisor(policy.num_moe_layers, shift.layers)
    return shift_weight(distance, layers, shift.floor), distance / layers


@torch.no_grad()
def gamma_mean(policy: Policy, scored: Sequence[ScoredPack]) -> torch.Tensor:
    """The mean of gamma~ over the tokens of the mini-batch that it acts on, 0-d. A collective.

    The loss of the first pack needs it, and it is known only when the last pack has gone forward
    on the last rank: so all packs go forward once more, without gradients. On the last stage only;
    1 elsewhere, and where gamma~ acts on no token.
    """
    config = policy.config
    device = policy.device.torch_device
    sums = [torch.zeros(2, dtype=torch.float64, device=device)]
    unseen = RouterTelemetry(config.model.num_layers, config.model.num_experts, device)

    def forward_step(chunk, model, index):
        item = scored[index]
        output, distance = forward_compared(policy, chunk, model, item, unseen)

        def keep(logits):
            gamma, _ = gamma_of(policy, item.pack, distance)
            mode = config.algorithm.router_shift.mode
            sums.append(torch.stack(acting_sum(gamma, item.pack.advantages, item.pack.mask, mode)))
            return torch.zeros((), device=logits.device), None

        return output, keep

    run_schedule(policy, [item.pack for item in scored], forward_step, forward_only=True)
    policy.relay.finish()
    total, count = all_reduce(torch.stack(sums).sum(0), policy.groups.data)
    return torch.where(count > 0.5, total / count.clamp(min=1.0), 1.0)
