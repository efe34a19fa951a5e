"""Megatron's data-parallel wrapper, optimizer and learning-rate schedule."""

from __future__ import annotations

from typing import Any, Mapping, Sequence

from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
)
from megatron.core.optimizer import MegatronOptimizer, get_megatron_optimizer
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_rl.catalogue.optimizers import AdamSettings
from megatron_rl.config.optimizer import optimizer_of, optimizer_settings
from megatron_rl.config.schema import Config, OptimizerConfig, ParallelConfig
from megatron_rl.device.select import Device
from megatron_rl.models.gpt.chunk import Chunk
from megatron_rl.optimizers.members import members
from megatron_rl.optimizers.replace import replace_optimizer
from megatron_rl.parallel.groups import Groups
from megatron_rl.policy.data_parallel import DataParallel, share_gradients


def wrap_data_parallel(
    chunks: Sequence[Chunk],
    transformer: TransformerConfig,
    parallel: ParallelConfig,
    device: Device,
    timeout_s: float,
) -> list[DataParallel]:
    """Wrap each chunk: gradients are summed in fp32 over the data-parallel ranks, on a CPU in
    shared memory where there is some. A collective.
    """
    settings = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        use_distributed_optimizer=parallel.distributed_optimizer,
        check_for_nan_in_grad=False,  # policy/finite_checks.py names the weight
    )
    wrapped = [
        # Only the first chunk's gradients are worth overlapping early; Megatron disables buckets
        # elsewhere too.
        DataParallel(transformer, settings, chunk, disable_bucketing=i > 0)
        for i, chunk in enumerate(chunks)
    ]
    if not (parallel.overlap_grad_reduce or parallel.distributed_optimizer):
        share_gradients(wrapped, timeout_s)
    if parallel.overlap_grad_reduce:
        hooks = [chunk.no_sync for chunk in wrapped]
        transformer.no_sync_func = hooks if len(hooks) > 1 else hooks[0]
    return wrapped


def build_optimizer(
    config: Config,
    wrapped: Sequence[DistributedDataParallel],
    transformer: TransformerConfig,
    groups: Groups,
) -> MegatronOptimizer:
    """The configured optimizer with fp32 main weights; the chain has a separate one for experts."""
    settings, row = config.optimizer, optimizer_of(config.optimizer)
    own = optimizer_settings(settings)
    adam = own if row.of_megatron and isinstance(own, AdamSettings) else AdamSettings()
    optimizer = get_megatron_optimizer(
        MegatronOptimizerConfig(
            optimizer="adam",
            lr=settings.lr,
            min_lr=settings.min_lr,
            weight_decay=settings.weight_decay,
            adam_beta1=adam.beta1,
            adam_beta2=adam.beta2,
            adam_eps=adam.epsilon,
            clip_grad=settings.clip_grad,
            bf16=transformer.bf16,
            params_dtype=transformer.params_dtype,
            use_distributed_optimizer=config.parallel.distributed_optimizer,
        ),
        list(wrapped),
    )
    if row.of_megatron:
        _fuse_on_cpu(optimizer)
    else:
        chunks = [chunk.module for chunk in wrapped]
        replace_optimizer(optimizer, row, own, chunks, groups, config.model)
    transformer.grad_scale_func = optimizer.scale_loss
    return optimizer


def _fuse_on_cpu(optimizer: MegatronOptimizer) -> None:
    """Let torch's Adam step weights on a CPU in one pass over memory: its default is a dozen.
    Elsewhere it chooses by itself, or Megatron has another.
    """
    for member in members(optimizer):
        for group in member.optimizer.param_groups:
            if "fused" in group and all(weight.device.type == "cpu" for weight in group["params"]):
                group["fused"], group["foreach"] = True, False


def build_scheduler(
    settings: OptimizerConfig, optimizer: MegatronOptimizer, optimizer_steps: int
) -> OptimizerParamScheduler:
    """Linear warm-up, then the chosen decay down to ``min_lr`` at the last optimizer step."""
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=settings.lr,
        min_lr=settings.min_lr,
        lr_warmup_steps=settings.warmup_steps,
        lr_decay_steps=_decay_steps(optimizer_steps, settings.warmup_steps),
        lr_decay_style=settings.schedule,
        start_wd=settings.weight_decay,
        end_wd=settings.weight_decay,
        wd_incr_steps=0,
        wd_incr_style="constant",
        # Loading a state restores only the number of updates: by default Megatron would also
        # restore lengths, shape, rates and weight decay of the run that wrote it.
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
    )


def continue_schedule(
    scheduler: OptimizerParamScheduler, state: Mapping[str, Any], updates_left: int
) -> None:
    """Continue after the updates that a stored schedule has made, with the configuration's
    settings.

    Args:
        scheduler: new, of `build_scheduler`.
        state: its ``state_dict`` at the checkpoint.
        updates_left: optimizer steps that are still to come. The decay ends with the last of them,
            even if earlier steps had another number of mini-batches.
    """
    scheduler.lr_decay_steps = _decay_steps(
        state["num_steps"] + updates_left, scheduler.lr_warmup_steps
    )
    scheduler.load_state_dict(dict(state))


def _decay_steps(updates: int, warmup_steps: int) -> int:
    """Megatron requires the decay to end after the warm-up."""
    return max(updates, warmup_steps + 1)
