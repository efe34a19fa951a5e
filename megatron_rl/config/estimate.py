"""Size of a run before it starts: parameters, memory of the fullest rank, bytes of router trace.

Pure arithmetic on the config; no torch. Weights, gradients and optimizer state follow from the
layout; activations are an approximation, stated at ``activation_bytes``. It leaves out the
rollout's KV cache, communication buffers, the allocator's overhead and the libraries.

Legend: D hidden, H query heads, G key/value heads, d head_dim, F dense MLP width, E experts,
K top-K, Fe expert width, Fs shared-expert width, V vocabulary; for latent attention Rq and Rkv the
compressed widths, r the rotated part of d, v the width of a value head.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from megatron_rl.config.layout import (
    data_parallel_size,
    expert_data_parallel_size,
    heads_of,
    moe_layers,
    stage_layers,
)
from megatron_rl.config.optimizer import optimizer_of
from megatron_rl.config.schema import Config, ModelConfig

GIB = 2**30
#: Bytes of a weight or activation.
DTYPE_BYTES = {"fp32": 4, "bf16": 2}
#: Logits of a tile of the output layer on CUDA, the larger one (`parallel.vocab_tiles.TILE`).
HEAD_TILE = 1 << 25


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    head: float
    copies: float = 0.0  #: of experts, with their gradients
    kept: float = 0.0  #: sets of tokens that the sampler kept

    @property
    def total(self) -> float:
        """Their sum, bytes."""
        return sum(asdict(self).values())


def attention_parameters(model: ModelConfig) -> tuple[int, int]:
    """Parameters of a layer's attention: (split over tensor ranks, whole on each), with its two
    norms over D.

    The matrices (`attention_matrices`), and vectors. Split: with qkv_bias (H + 2 G) d. Whole: 2 D,
    and the norms of queries and keys, 2 d per head or (H + G) d over all heads; of latent attention
    Rq + Rkv.
    """
    split, whole = attention_matrices(model)
    heads, groups, width = heads_of(model)
    whole += 2 * model.hidden_size
    if model.kv_lora_rank:
        return split, whole + model.kv_lora_rank + (model.q_lora_rank or 0)
    if model.qkv_bias:
        split += (heads + 2 * groups) * width
    if model.qk_norm:
        whole += 2 * width if model.qk_norm_scope == "head" else (heads + groups) * width
    return split, whole


def attention_matrices(model: ModelConfig) -> tuple[int, int]:
    """Elements of a layer's projections: (split over tensor ranks, whole on each).

    q and o, 2 H d D; k and v, 2 G d D; all split. Latent attention: split Rq H d, Rkv H (d - r + v)
    and H v D, whole D Rq and D (Rkv + r); without Rq split D H d in its place.
    """
    heads, groups, width = heads_of(model)
    hidden, queries, compressed = model.hidden_size, model.q_lora_rank, model.kv_lora_rank
    if not compressed:
        return 2 * (heads + groups) * width * hidden, 0
    rotated, of_values = model.qk_rope_head_dim or 0, model.v_head_dim or 0
    split = (queries or hidden) * heads * width
    split += compressed * heads * (width - rotated + of_values) + heads * of_values * hidden
    return split, hidden * (compressed + rotated) + hidden * (queries or 0)


def expert_parameters(model: ModelConfig) -> int:
    """Parameters of one expert: gate, up and down projections, 3 D Fe."""
    return 3 * model.hidden_size * model.moe_ffn_hidden_size


def mlp_parameters(model: ModelConfig, is_moe: bool) -> tuple[int, int]:
    """Parameters of a layer's MLP without routed experts: (split over tensor ranks, whole on each).

    Dense: 3 D F split. MoE: shared expert 3 D Fs split; router D E and shared gate D, which give
    scores, whole. The expert bias is a buffer, no parameter.
    """
    if not is_moe:
        return 3 * model.hidden_size * model.ffn_hidden_size, 0
    shared = 3 * model.hidden_size * (model.shared_expert_ffn_hidden_size or 0)
    gate = model.hidden_size if model.shared_expert_gate else 0
    return shared, model.hidden_size * model.num_experts + gate


def count_parameters(model: ModelConfig) -> tuple[int, int]:
    """(all, active for a token): embeddings V D, untied output V D, final norm D and every layer.

    Active counts K of E experts in each MoE layer, and the embeddings in full.
    """
    embeddings = model.vocab_size * model.hidden_size * (1 if model.tie_embeddings else 2)
    total = embeddings + model.hidden_size
    routed = 0
    for is_moe in moe_layers(model):
        total += sum(attention_parameters(model)) + sum(mlp_parameters(model, is_moe))
        routed += expert_parameters(model) * is_moe
    active = total + model.moe_top_k * routed
    return total + model.num_experts * routed, active


def expert_id_bytes(num_experts: int) -> int:
    """Bytes of the smallest integer that holds an expert's id: uint8, int16 or int32."""
    return 1 if num_experts <= 2**8 else 2 if num_experts <= 2**15 else 4


def trace_bytes_per_token(model: ModelConfig, distance: str = "top_k") -> int:
    """Router trace: MoE layers x (K x bytes of an expert id + 4 for each log-probability): of the
    K experts, or of all E with ``algorithm.router_shift.distance`` union.

    Over all pipeline stages.
    """
    return sum(moe_layers(model)) * _trace_bytes_per_layer(model, distance)


def trace_bytes(config: Config, world_size: int, longest: int) -> int:
    """Router trace of a rollout batch on the fullest rank, if all sequences have ``longest``
    tokens; the padding of packs is not counted.

    Tokens: prompts_per_step x samples_per_prompt x longest / (data x tensor x context), times the
    MoE layers of a pipeline stage.
    """
    rollout, parallel = config.rollout, config.parallel
    sequences = rollout.prompts_per_step * rollout.samples_per_prompt
    ranks = data_parallel_size(parallel, world_size) * parallel.tensor * parallel.context
    is_moe = moe_layers(config.model)
    stages = stage_layers(config.model.num_layers, parallel)
    layers = max(sum(is_moe[layer] for layer in stage) for stage in stages)
    per_layer = _trace_bytes_per_layer(config.model, config.algorithm.router_shift.distance)
    return sequences * longest * layers * per_layer // ranks


def trace_text(config: Config, world_size: int, longest: int) -> str:
    """`trace_bytes` as text."""
    place = "pinned host" if config.algorithm.trace_store == "pinned" else "device"
    size = size_text(trace_bytes(config, world_size, longest))
    return f"at most {size} of {place} memory on a rank, for sequences of {longest:,} tokens"


def size_text(size: float) -> str:
    """Bytes in the largest binary unit that fits at least once: 1536 is 1.5 KiB."""
    units = ["bytes", "KiB", "MiB", "GiB", "TiB"]
    while size >= 1024 and len(units) > 1:
        size, units = size / 1024, units[1:]
    return f"{size:.3g} {units[0]}" if size < 999.5 else f"{size:.0f} {units[0]}"


def _trace_bytes_per_layer(model: ModelConfig, distance: str) -> int:
    scored = model.num_experts if distance == "union" else model.moe_top_k
    return model.moe_top_k * expert_id_bytes(model.num_experts) + 4 * scored


def rank_memory(config: Config, world_size: int) -> Memory:
    """Memory of the fullest rank in an update, over the pipeline stages."""
    stages = range(config.parallel.pipeline)
    return max((_stage_memory(config, world_size, s) for s in stages), key=lambda m: m.total)


def _stage_memory(config: Config, world_size: int, stage: int) -> Memory:
    """Memory of a rank of one pipeline stage.

    Weights: bytes of dtype a parameter. Gradients: fp32, 4 bytes a parameter. Optimizer: Adam's two
    moments, 8 bytes (of muon one, 4 bytes, for matrices of the layers; routers and gates of shared
    experts are counted as Adam's), and for bf16 the fp32 main weights, 4 more; the distributed
    optimizer shares them among the ranks with the same parameters (data-parallel x context,
    expert-data-parallel).
    """
    parallel, element = config.parallel, DTYPE_BYTES[config.model.dtype]
    dense, experts = _rank_parameters(config, stage)
    matrices = _rank_matrices(config, stage)
    main = 4 if element == 2 else 0
    state, state_of_matrices = 8 + main, 4 * optimizer_of(config.optimizer).matrix_moments + main
    dense_state = (dense - matrices) * state + matrices * state_of_matrices
    if parallel.distributed_optimizer:
        dense_shards = data_parallel_size(parallel, world_size) * parallel.context
        expert_shards = expert_data_parallel_size(parallel, world_size)
    else:
        dense_shards = expert_shards = 1
    last = stage == parallel.pipeline - 1
    return Memory(
        weights=(dense + experts) * element,
        gradients=(dense + experts) * 4,
        optimizer=dense_state / dense_shards + experts / expert_shards * state_of_matrices,
        activations=activation_bytes(config, stage),
        head=head_bytes(config) if last else 0,
        copies=expert_copies_bytes(config, stage) if _copies_experts(config) else 0,
        kept=kept_bytes(config, world_size) if last else 0,
    )


def memory_rows(config: Config, world_size: int) -> list[tuple[str, str]]:
    """(name, value) of `rank_memory` and its parts, for ``check``."""
    memory = rank_memory(config, world_size)
    rows = [
        ("memory per rank", f"{size_text(memory.total)} in an update, of which"),
        ("  weights", f"{size_text(memory.weights)} ({config.model.dtype})"),
        ("  gradients", f"{size_text(memory.gradients)}"),
        ("  optimizer state", f"{size_text(memory.optimizer)}"),
        ("  activations", f"{size_text(memory.activations)} (approximate)"),
        ("  output layer", f"{size_text(memory.head)}"),
    ]
    if _copies_experts(config):
        rows.append(("  copies of experts", f"{size_text(memory.copies)}, with their gradients"))
    if config.rollout.keep_sampling_mask:
        known = f"at most {size_text(memory.kept)} of a rollout batch"
        rows.append(("  kept tokens", known if config.rollout.top_k else "as many as top_p keeps"))
    return rows


def _copies_experts(config: Config) -> bool:
    """Whether updates hold copies of all experts for sure; auto takes memory only if it is free."""
    parallel = config.parallel
    return parallel.expert_exchange == "weights" and parallel.expert * parallel.expert_tensor > 1


def expert_copies_bytes(config: Config, stage: int) -> float:
    """What ``parallel.expert_exchange`` weights takes on a rank of a pipeline stage: copies of all
    experts of its MoE layers, and their gradients in fp32 twice, as computed and as received.
    """
    model, is_moe = config.model, moe_layers(config.model)
    layers = sum(is_moe[layer] for layer in stage_layers(model.num_layers, config.parallel)[stage])
    experts = layers * model.num_experts * expert_parameters(model)
    return experts * (DTYPE_BYTES[model.dtype] + 8.0)


def kept_bytes(config: Config, world_size: int) -> float:
    """Sets of ``rollout.keep_sampling_mask`` of a rollout batch on the device, if all answers are
    as long as they may be: top_k ids a token, of each its token and its word in int64. 0 with top_k
    0, since nothing bounds what top_p keeps.

    Tokens: prompts_per_step x samples_per_prompt x those of an answer, or of the answers of a
    conversation, / (data x context); tensor-parallel ranks hold the same sets.
    """
    rollout, parallel = config.rollout, config.parallel
    if not rollout.keep_sampling_mask:
        return 0
    turns = 1 if rollout.environment is None else rollout.max_turns
    longest = min(turns * rollout.max_new_tokens, config.model.max_sequence_length)
    tokens = rollout.prompts_per_step * rollout.samples_per_prompt * longest
    ranks = data_parallel_size(parallel, world_size) * parallel.context
    return 16 * rollout.top_k * tokens / ranks


def _rank_parameters(config: Config, stage: int) -> tuple[float, float]:
    """(dense, expert) parameters: split ones / tensor, experts / (expert x expert_tensor)."""
    model, parallel = config.model, config.parallel
    is_moe = moe_layers(model)
    split = whole = experts = 0
    for layer in stage_layers(model.num_layers, parallel)[stage]:
        for a, b in (attention_parameters(model), mlp_parameters(model, is_moe[layer])):
            split, whole = split + a, whole + b
        experts += expert_parameters(model) * model.num_experts * is_moe[layer]
    table = model.vocab_size * model.hidden_size
    last = stage == parallel.pipeline - 1
    if stage == 0:
        split += table
    if last:
        whole += model.hidden_size
        # a tied output layer is the embedding itself, or its copy on another stage
        split += table if not model.tie_embeddings or stage > 0 else 0
    return split / parallel.tensor + whole, experts / (parallel.expert * parallel.expert_tensor)


def _rank_matrices(config: Config, stage: int) -> float:
    """Of the dense parameters those of the layers' projections and of their dense and shared MLPs:
    matrices between two hidden spaces.
    """
    model, parallel = config.model, config.parallel
    is_moe = moe_layers(model)
    total = 0.0
    for layer in stage_layers(model.num_layers, parallel)[stage]:
        split, whole = attention_matrices(model)
        split += mlp_parameters(model, is_moe[layer])[0]
        total += split / parallel.tensor + whole
    return total


def activation_bytes(config: Config, stage: int) -> float:
    """Approximate activations kept for the backward pass: tokens x elements x bytes of dtype.

    Tokens: pack_tokens / (tensor x context). Elements a token and layer: attention and norms
    4 D + 2 (H + G) d, with latent attention 4 D + 2 H (d + v) + Rq + Rkv + r; dense MLP 3 F; MoE
    K (2 D + 3 Fe) + 3 Fs + 2 E (the router's in fp32), tokens spread evenly over the experts.
    recompute selective: without the core attention's output, H d (latent: H v). recompute full: the
    input D of every layer, and one layer whole while it is recomputed. The schedule keeps
    ``pipeline - stage`` packs; with virtual stages ``pipeline + (pipeline - 1) / virtual`` of them.
    """
    model, parallel = config.model, config.parallel
    tokens = config.data.pack_tokens / (parallel.tensor * parallel.context)
    is_moe = moe_layers(model)
    layers = stage_layers(model.num_layers, parallel)[stage]
    per_layer = [_layer_elements(config, is_moe[layer]) for layer in layers]
    packs: float = parallel.pipeline - stage
    if parallel.virtual_pipeline:
        packs = parallel.pipeline + (parallel.pipeline - 1) / parallel.virtual_pipeline
    if parallel.recompute == "full":
        kept = packs * len(layers) * model.hidden_size + max(per_layer)
    else:
        kept = packs * sum(per_layer)
    return tokens * kept * DTYPE_BYTES[model.dtype]


def _layer_elements(config: Config, is_moe: bool) -> int:
    """Elements a token leaves in one layer, see ``activation_bytes``."""
    model = config.model
    heads, groups, width = heads_of(model)
    elements, of_values = 4 * model.hidden_size + 2 * (heads + groups) * width, width
    if model.kv_lora_rank:
        of_values = model.v_head_dim or 0
        elements -= 2 * heads * (width - of_values)
        elements += (model.q_lora_rank or 0) + model.kv_lora_rank + (model.qk_rope_head_dim or 0)
    if config.parallel.recompute == "selective":
        elements -= heads * of_values
    if not is_moe:
        return elements + 3 * model.ffn_hidden_size
    routed = model.moe_top_k * (2 * model.hidden_size + 3 * model.moe_ffn_hidden_size)
    router = 2 * model.num_experts * 4 // DTYPE_BYTES[model.dtype]
    return elements + routed + 3 * (model.shared_expert_ffn_hidden_size or 0) + router


def head_bytes(config: Config) -> float:
    """What the output layer works in: a tile of logits, rounded and in fp32 (8 bytes each, of at
    most HEAD_TILE logits; 4 more where one tile holds them all, which is kept), hidden states of
    all tokens with an fp32 gradient, and the weight's gradient before it is added to the fp32 one.

    Tokens: pack_tokens / context. Words: V / tensor.
    """
    model, parallel = config.model, config.parallel
    width = DTYPE_BYTES[model.dtype]
    tokens, words = config.data.pack_tokens / parallel.context, model.vocab_size / parallel.tensor
    tile = 12 * tokens * words if tokens * words <= HEAD_TILE else 8 * HEAD_TILE
    return tile + (tokens * (width + 4) + words * width) * model.hidden_size
