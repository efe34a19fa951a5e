"""Rules of the parallel layout and of packs: one function each, named after the rule."""

from __future__ import annotations

from typing import Callable

from megatron_rl.config.layout import ranks_wanted, smallest_world
from megatron_rl.config.schema import Config
from megatron_rl.errors import UserError


def tensor_parallel_divides_model(config: Config) -> None:
    """Tensor parallelism cuts heads, key/value heads and MLP widths evenly."""
    model, tensor = config.model, config.parallel.tensor
    sizes = {
        "num_attention_heads": model.num_attention_heads,
        "num_query_groups": model.num_query_groups or model.num_attention_heads,
        "ffn_hidden_size": model.ffn_hidden_size,
        "shared_expert_ffn_hidden_size": model.shared_expert_ffn_hidden_size or 0,
        "q_lora_rank": model.q_lora_rank or 0,
        "kv_lora_rank + qk_rope_head_dim": (model.kv_lora_rank or 0)
        + (model.qk_rope_head_dim or 0),
    }
    for name, size in sizes.items():
        if size % tensor:
            raise UserError(
                f"model.{name} {size} is no multiple of parallel.tensor {tensor}; expected a "
                "multiple; change one of them"
            )


def expert_tensor_divides_experts(config: Config) -> None:
    """Expert tensor parallelism cuts the inner width of an expert evenly."""
    width, parts = config.model.moe_ffn_hidden_size, config.parallel.expert_tensor
    if width % parts:
        raise UserError(
            f"model.moe_ffn_hidden_size {width} is no multiple of parallel.expert_tensor {parts}; "
            "expected a multiple; change one of them"
        )


def experts_spread_evenly(config: Config) -> None:
    """Each expert-parallel rank holds the same number of experts."""
    experts, parts = config.model.num_experts, config.parallel.expert
    if experts % parts:
        raise UserError(
            f"model.num_experts {experts} is no multiple of parallel.expert {parts}; expected a "
            "multiple; change one of them"
        )


def dense_models_have_no_experts_to_spread(config: Config) -> None:
    """Expert parallelism is for MoE models."""
    parallel = config.parallel
    for name in ("expert", "expert_tensor"):
        if not config.model.num_experts and getattr(parallel, name) > 1:
            raise UserError(
                f"parallel.{name} is {getattr(parallel, name)} with a dense model "
                "(model.num_experts 0); expected 1; use tensor, pipeline, context or more ranks"
            )


def virtual_pipeline_needs_pipeline(config: Config) -> None:
    """The interleaved schedule interleaves stages."""
    parallel = config.parallel
    if parallel.virtual_pipeline is not None and parallel.pipeline == 1:
        raise UserError(
            f"parallel.virtual_pipeline is {parallel.virtual_pipeline} with parallel.pipeline 1; "
            "expected more than one pipeline stage; set virtual_pipeline to null or raise "
            "pipeline"
        )


def layers_spread_evenly(config: Config) -> None:
    """Each chunk of each pipeline stage holds the same number of layers."""
    parallel, layers = config.parallel, config.model.num_layers
    chunks = parallel.pipeline * (parallel.virtual_pipeline or 1)
    if layers % chunks:
        raise UserError(
            f"model.num_layers {layers} is no multiple of {chunks} = parallel.pipeline "
            f"{parallel.pipeline} x virtual_pipeline {parallel.virtual_pipeline or 1}; expected a "
            "multiple; change one of them"
        )


def flex_dispatcher_needs_cuda(config: Config) -> None:
    """The flex dispatcher runs on DeepEP, which is CUDA only."""
    if config.parallel.dispatcher == "flex" and config.device.kind != "cuda":
        raise UserError(
            f"parallel.dispatcher is flex with device.kind {config.device.kind}; expected CUDA "
            "(DeepEP); set device.kind to cuda or the dispatcher to alltoall"
        )


def weights_travel_for_the_alltoall_dispatcher(config: Config) -> None:
    """Where weights travel the dispatcher leaves tokens in place, which only that one knows."""
    parallel = config.parallel
    if parallel.expert_exchange == "weights" and parallel.dispatcher != "alltoall":
        raise UserError(
            f"found parallel.expert_exchange weights with parallel.dispatcher "
            f"{parallel.dispatcher}; expected alltoall; change one of them"
        )


def layout_fits_world(config: Config, world_size: int) -> None:
    """Ranks divide by tensor x pipeline x context and by pipeline x expert x expert_tensor."""
    p = config.parallel
    dense, experts = p.tensor * p.pipeline * p.context, p.pipeline * p.expert * p.expert_tensor
    if world_size % dense:
        raise UserError(
            f"{world_size} ranks for tensor {p.tensor} x pipeline {p.pipeline} x context "
            f"{p.context}; expected a multiple of {dense}; use {smallest_world(p)} ranks or "
            "another layout"
        )
    if world_size % experts:
        raise UserError(
            f"{world_size} ranks for pipeline {p.pipeline} x expert {p.expert} x expert_tensor "
            f"{p.expert_tensor}; expected a multiple of {experts}; use {smallest_world(p)} ranks "
            "or another layout"
        )


def ranks_are_as_configured(config: Config, world_size: int, verb: str) -> None:
    """The number of ranks is the one that the config asks for."""
    wanted = ranks_wanted(config.parallel)
    if world_size == 1 and wanted > 1:
        layout_fits_world(config, wanted)  # otherwise the command below would be refused too
        raise UserError(
            f"found 1 rank; the config's parallel section needs {wanted}; start it with: torchrun "
            f"--nproc-per-node {wanted} -m megatron_rl {verb} CONFIG"
        )
    if config.parallel.world_size not in (None, world_size):
        raise UserError(
            f"found {world_size} ranks; parallel.world_size is {config.parallel.world_size}; "
            "expected them equal; launch that many or change parallel.world_size"
        )


def packs_hold_a_sequence(config: Config) -> None:
    """The longest sequence fits in one pack."""
    longest, room = config.model.max_sequence_length, config.data.pack_tokens
    if room < longest:
        raise UserError(
            f"data.pack_tokens {room} is below model.max_sequence_length {longest}; expected at "
            "least that; raise data.pack_tokens or lower model.max_sequence_length"
        )


def pack_length_divides(config: Config) -> None:
    """Packs are cut evenly: by tensor (sequence parallelism) and into 2 x context slices."""
    p, data = config.parallel, config.data
    slices = p.tensor * (2 * p.context if p.context > 1 else 1)
    if data.pack_multiple % slices:
        raise UserError(
            f"data.pack_multiple {data.pack_multiple} is no multiple of {slices} = tensor x 2 "
            "context; expected a multiple, so that every pack is cut evenly"
        )
    if data.pack_tokens % data.pack_multiple:
        raise UserError(
            f"data.pack_tokens {data.pack_tokens} is no multiple of data.pack_multiple "
            f"{data.pack_multiple}; expected a multiple; change one of them"
        )


LAYOUT_RULES: tuple[Callable[[Config], None], ...] = (
    tensor_parallel_divides_model,
    expert_tensor_divides_experts,
    experts_spread_evenly,
    dense_models_have_no_experts_to_spread,
    virtual_pipeline_needs_pipeline,
    layers_spread_evenly,
    flex_dispatcher_needs_cuda,
    weights_travel_for_the_alltoall_dispatcher,
    packs_hold_a_sequence,
    pack_length_divides,
)
