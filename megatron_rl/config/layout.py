"""Arithmetic of the parallel layout: ranks needed, data-parallel sizes, layers of a stage."""

from __future__ import annotations

from math import lcm

from megatron_rl.config.schema import ModelConfig, ParallelConfig

#: Fields of ``ParallelConfig`` that split the model.
SPLITS = ("tensor", "pipeline", "virtual_pipeline", "context", "expert", "expert_tensor")


def smallest_world(parallel: ParallelConfig) -> int:
    """Fewest ranks the layout fits: pipeline x lcm(tensor x context, expert x expert_tensor)."""
    dense = parallel.tensor * parallel.context
    return parallel.pipeline * lcm(dense, parallel.expert * parallel.expert_tensor)


def ranks_wanted(parallel: ParallelConfig) -> int:
    """``parallel.world_size`` if given, else the fewest ranks the layout fits."""
    return parallel.world_size or smallest_world(parallel)


def data_parallel_size(parallel: ParallelConfig, world_size: int) -> int:
    """Replicas that draw different problems: world / (tensor x pipeline x context)."""
    return world_size // (parallel.tensor * parallel.pipeline * parallel.context)


def expert_data_parallel_size(parallel: ParallelConfig, world_size: int) -> int:
    """Copies of each expert: world / (pipeline x expert x expert_tensor)."""
    return world_size // (parallel.pipeline * parallel.expert * parallel.expert_tensor)


def layout_text(parallel: ParallelConfig, world_size: int) -> str:
    """The layout for reading: data-parallel size and every split there is, "data 4, expert 2"."""
    splits = [(name, getattr(parallel, name)) for name in SPLITS]
    parts = [f"{name} {size}" for name, size in splits if size not in (None, 1)]
    return ", ".join([f"data {data_parallel_size(parallel, world_size)}", *parts])


def heads_of(model: ModelConfig) -> tuple[int, int, int]:
    """(query heads H, key/value heads G, width d of a query or key head), defaults filled in."""
    heads, groups = model.num_attention_heads, model.num_query_groups
    if model.kv_lora_rank:
        return heads, heads, (model.qk_nope_head_dim or 0) + (model.qk_rope_head_dim or 0)
    return heads, groups or heads, model.head_dim or model.hidden_size // heads


def moe_layers(model: ModelConfig) -> list[bool]:
    """Whether each of the ``num_layers`` layers, over all stages, is a MoE layer."""
    if not model.num_experts:
        return [False] * model.num_layers
    if isinstance(model.moe_layer_freq, int):
        return [layer % model.moe_layer_freq == 0 for layer in range(model.num_layers)]
    return [bool(mark) for mark in model.moe_layer_freq]


def stage_layers(num_layers: int, parallel: ParallelConfig) -> list[list[int]]:
    """Layers of each pipeline stage; with virtual stages, chunk c belongs to stage c % pipeline."""
    chunks = parallel.pipeline * (parallel.virtual_pipeline or 1)
    size = num_layers // chunks
    return [
        [c * size + i for c in range(stage, chunks, parallel.pipeline) for i in range(size)]
        for stage in range(parallel.pipeline)
    ]
