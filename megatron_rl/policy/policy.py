"""The policy being trained: this rank's part of the model, its optimizer and its router capture."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Sequence

import torch
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_rl.algorithms.distance_rules import distance_rule
from megatron_rl.algorithms.layer_rules import layer_rule
from megatron_rl.config.algorithm import distance_is_attached
from megatron_rl.config.layout import moe_layers
from megatron_rl.config.schema import Config
from megatron_rl.device.memory import spare_bytes
from megatron_rl.device.select import Device
from megatron_rl.models.build import build_chunks, shares_prompts, transformer_config
from megatron_rl.models.gpt.chunk import Chunk, layer_numbers, routers_of
from megatron_rl.parallel.groups import Groups
from megatron_rl.policy.expert_exchange import ExpertExchange, exchange_plan
from megatron_rl.policy.optimizer import build_optimizer, build_scheduler, wrap_data_parallel
from megatron_rl.policy.reference import ReferenceWeights
from megatron_rl.router.capture import RouterCapture
from megatron_rl.router.relay import DistanceRelay
from megatron_rl.router.replay import RouteReplay


@dataclass(frozen=True)
class Policy:
    """Everything a pass over the model needs; built once."""

    config: Config
    device: Device
    groups: Groups
    transformer: TransformerConfig
    chunks: tuple[Chunk, ...]  #: bare model chunks of this rank, in order of virtual stages
    wrapped: tuple[DistributedDataParallel, ...]  #: the same, wrapped for data parallelism
    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler
    capture: RouterCapture
    relay: DistanceRelay
    exchange: ExpertExchange
    replay: RouteReplay | None  #: None: every router chooses for itself
    num_moe_layers: int  #: L, over all pipeline stages
    reference: ReferenceWeights | None = None  #: None: no reference policy is scored

    def chunk_index(self, model: torch.nn.Module) -> int:
        """Index of the chunk that Megatron's schedule is running."""
        return next(i for i, chunk in enumerate(self.wrapped) if chunk is model)


def build_policy(
    config: Config,
    device: Device,
    groups: Groups,
    optimizer_steps: int,
    *,
    with_reference: bool = False,
) -> Policy:
    """Build the model of this rank, its optimizer and its router capture.

    Args:
        config: the whole configuration.
        device: chosen device.
        groups: process groups.
        optimizer_steps: length of the learning-rate schedule.
        with_reference: make room for a reference policy; the caller loads its weights.
    """
    shares_prompts(config, device.torch_device)  # refuses what the attention cannot do
    transformer = transformer_config(
        config.model,
        config.parallel,
        device,
        routing_replay=config.algorithm.routing_replay != "none",
    )
    chunks = build_chunks(config.model, transformer, groups, device, config.seed)
    timeout_s = config.device.timeout_s
    wrapped = wrap_data_parallel(chunks, transformer, config.parallel, device, timeout_s)
    optimizer = build_optimizer(config, wrapped, transformer, groups)
    plan = exchange_plan(config, groups, device.torch_device, spare_bytes())
    exchange = ExpertExchange(plan, chunks, wrapped, groups)
    transformer.finalize_model_grads_func = exchange.before(finalize_model_grads)
    moe, shift = moe_layers(config.model), config.algorithm.router_shift
    held, routers = [layer_numbers(chunk) for chunk in chunks], routers_of(chunks)
    return Policy(
        config=config,
        device=device,
        groups=groups,
        transformer=transformer,
        chunks=tuple(chunks),
        wrapped=tuple(wrapped),
        optimizer=optimizer,
        scheduler=build_scheduler(config.optimizer, optimizer, optimizer_steps),
        capture=RouterCapture(
            routers,
            [[layer for layer in layers if moe[layer - 1]] for layers in held],
            distance_rule(shift.distance, shift.experts),
            attached=distance_is_attached(config),
        ),
        replay=RouteReplay(routers) if config.algorithm.routing_replay != "none" else None,
        relay=_relay(config, transformer, groups, held),
        exchange=exchange,
        num_moe_layers=sum(moe),
        reference=ReferenceWeights(chunks) if with_reference else None,
    )


def _relay(
    config: Config, transformer: TransformerConfig, groups: Groups, held: Sequence[Sequence[int]]
) -> DistanceRelay:
    """held: of each chunk the numbers of its layers, from 1."""
    moe, shift = moe_layers(config.model), config.algorithm.router_shift
    return DistanceRelay(
        layer_rule(shift.layers, shift.quantile),
        [sum(moe[: layers[0] - 1]) for layers in held],
        num_layers=sum(moe),
        hidden_size=transformer.hidden_size,
        dtype=transformer.pipeline_dtype,
        is_first=groups.is_first_stage,
        is_last=groups.is_last_stage,
    )
