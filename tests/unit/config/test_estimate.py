"""Sizes: published parameter counts, a tiny model by hand, and how the layout divides memory."""

import pytest

from megatron_rl.config.estimate import (
    HEAD_TILE,
    activation_bytes,
    count_parameters,
    expert_copies_bytes,
    head_bytes,
    kept_bytes,
    memory_rows,
    rank_memory,
    size_text,
    trace_bytes,
    trace_bytes_per_token,
)
from megatron_rl.config.presets import MODEL_PRESETS
from megatron_rl.config.schema import Config, ModelConfig, OptimizerConfig, RouterShiftConfig


@pytest.mark.parametrize(
    ("preset", "total", "active"),
    [  # billions, as the models' publishers give them
        ("qwen3_30b_a3b", 30.5, 3.3),
        ("qwen3_235b_a22b", 235, 22),
        ("qwen1_5_moe_a2_7b", 14.3, 2.7),
        ("mixtral_8x7b", 46.7, 12.9),
        ("olmoe_1b_7b", 6.9, 1.3),
        ("deepseek_v3", 671, 37),
        ("moonlight_16b_a3b", 16, 2.9),
        ("qwen3_4b", 4.02, 4.02),
    ],
)
def test_parameters_are_those_published(preset, total, active):
    counted = count_parameters(ModelConfig(**MODEL_PRESETS[preset]))
    assert counted[0] / 1e9 == pytest.approx(total, rel=0.005)
    assert counted[1] / 1e9 == pytest.approx(active, rel=0.02)


#: D 6, H 2, G 1, d 4, F 10, E 4, K 2, Fe 3, V 20; layer 0 dense, layer 1 MoE.
SMALL = {
    **{"num_layers": 2, "hidden_size": 6, "num_attention_heads": 2, "num_query_groups": 1},
    **{"head_dim": 4, "ffn_hidden_size": 10, "num_experts": 4, "moe_top_k": 2},
    **{"moe_ffn_hidden_size": 3, "moe_layer_freq": [0, 1], "vocab_size": 20, "qk_norm": True},
}
ATTENTION = 6 * 8 + 2 * 6 * 4 + 8 * 6  # q, k and v, o: 144
NORMS = 2 * 6 + 2 * 4  # of the layer, of queries and keys: 20
DENSE, EXPERT, ROUTER, TABLE = 3 * 6 * 10, 3 * 6 * 3, 6 * 4, 20 * 6  # 180, 54, 24, 120


def test_parameters_by_hand():
    others = 2 * (ATTENTION + NORMS) + DENSE + ROUTER + 2 * TABLE + 6
    assert count_parameters(ModelConfig(**SMALL)) == (others + 4 * EXPERT, others + 2 * EXPERT)
    tied = ModelConfig(**SMALL, tie_embeddings=True)
    assert count_parameters(tied)[0] == others + 4 * EXPERT - TABLE
    # shared expert of width 5 with its gate; biases of q, k, v; norms over all heads
    more = ModelConfig(
        **SMALL,
        shared_expert_ffn_hidden_size=5,
        shared_expert_gate=True,
        qkv_bias=True,
        qk_norm_scope="layer",
    )
    extra = 3 * 6 * 5 + 6 + 2 * (8 + 4 + 4) + 2 * ((8 + 4) - 2 * 4)
    assert count_parameters(more)[0] == others + 4 * EXPERT + extra


def test_latent_attention_by_hand():
    """Ranks 5 of queries and 3 of keys and values; heads of 4 + 2 channels, values of 3."""
    widths = {"qk_nope_head_dim": 4, "qk_rope_head_dim": 2, "v_head_dim": 3, "head_dim": None}
    latent = {**SMALL, **widths, "kv_lora_rank": 3, "num_query_groups": None}
    down, up = 6 * (3 + 2), 3 * 2 * (4 + 3)
    common = down + up + 2 * 3 * 6 + 3 + 2 * 6
    others = DENSE + ROUTER + 4 * EXPERT + 2 * TABLE + 6
    whole = ModelConfig(**latent)
    assert count_parameters(whole)[0] == others + 2 * (common + 6 * 2 * 6)
    compressed = ModelConfig(**latent, q_lora_rank=5)
    assert count_parameters(compressed)[0] == others + 2 * (common + 6 * 5 + 5 * 2 * 6 + 5)
    # queries and keys of 6 channels a head, values and the output of 3, and what is compressed
    config = Config(model=compressed, data={"pack_tokens": 10}, parallel={"recompute": "selective"})
    attention = 4 * 6 + 2 * 2 * 6 + 2 * 3 + 5 + 3 + 2
    dense, moe = attention + 3 * 10, attention + 2 * (2 * 6 + 3 * 3) + 2 * 4
    assert activation_bytes(config, 0) == 10 * 4 * (dense + moe)


@pytest.mark.parametrize(
    ("experts", "id_bytes"), [(8, 1), (256, 1), (257, 2), (32768, 2), (32769, 4)]
)
def test_trace_bytes(experts, id_bytes):
    model = ModelConfig(num_layers=4, moe_layer_freq=[0, 1, 1, 1], num_experts=experts, moe_top_k=2)
    assert trace_bytes_per_token(model) == 3 * 2 * (id_bytes + 4)
    assert trace_bytes_per_token(model, "gate_weighted") == 3 * 2 * (id_bytes + 4)
    assert trace_bytes_per_token(model, "union") == 3 * (2 * id_bytes + 4 * experts)


def test_trace_bytes_of_a_batch():
    """6 problems x 4 answers x 50 tokens over 2 data x 2 tensor x 3 context ranks: 100 tokens."""
    config = Config(
        model={"num_layers": 4, "moe_layer_freq": [0, 1, 1, 1], "num_experts": 8, "moe_top_k": 2},
        parallel={"tensor": 2, "context": 3, "pipeline": 2},
        rollout={"prompts_per_step": 6, "samples_per_prompt": 4},
    )
    # the second stage has two MoE layers, the first one
    assert trace_bytes(config, 24, 50) == 100 * 2 * 2 * 5
    interleaved = config.parallel.model_copy(update={"virtual_pipeline": 2})
    config = config.model_copy(update={"parallel": interleaved})
    # stages hold layers 1, 3 and 2, 4: the fullest has two as well
    assert trace_bytes(config, 24, 50) == 100 * 2 * 2 * 5
    assert trace_bytes(config, 48, 50) == 50 * 2 * 2 * 5
    algorithm = config.algorithm.model_copy(
        update={"router_shift": RouterShiftConfig(distance="union")}
    )
    union = config.model_copy(update={"algorithm": algorithm})
    assert trace_bytes(union, 48, 50) == 50 * 2 * (2 + 4 * 8)


def test_sizes_in_words():
    sizes = (0, 1023, 1536, 999.6 * 2**10, 1023 * 2**20, 2**30, 12345 * 2**40)
    texts = ("0 bytes", "1023 bytes", "1.5 KiB", "1000 KiB", "1023 MiB", "1 GiB", "12345 TiB")
    assert tuple(map(size_text, sizes)) == texts


def test_trace_bytes_of_qwen3():
    assert trace_bytes_per_token(ModelConfig(**MODEL_PRESETS["qwen3_30b_a3b"])) == 48 * 8 * 5


def make(dtype="fp32", pack_tokens=100, **parallel):
    data = {"pack_tokens": pack_tokens}
    return Config.model_validate(
        {"model": {**SMALL, "dtype": dtype}, "parallel": parallel, "data": data}
    )


def test_memory_of_one_rank_is_that_of_all_parameters():
    parameters = count_parameters(ModelConfig(**SMALL))[0]
    memory = rank_memory(make(), 1)
    assert (memory.weights, memory.gradients) == (4 * parameters, 4 * parameters)
    assert memory.optimizer == 8 * parameters
    half = rank_memory(make("bf16"), 1)
    assert (half.weights, half.gradients) == (2 * parameters, 4 * parameters)
    assert half.optimizer == 12 * parameters  # two moments and the fp32 main weights


def test_tensor_and_expert_parallel_divide_what_is_split():
    split = 2 * ATTENTION + DENSE + 2 * TABLE
    whole = 2 * NORMS + ROUTER + 6
    memory = rank_memory(make(tensor=2, expert=4), 4)
    assert memory.weights == 4 * (split / 2 + whole + 4 * EXPERT / 4)
    both = rank_memory(make(expert=2, expert_tensor=2), 4)
    assert both.weights == 4 * (split + whole + 4 * EXPERT / 4)


def test_the_distributed_optimizer_divides_its_state_among_equal_ranks():
    others = 2 * (ATTENTION + NORMS) + DENSE + ROUTER + 2 * TABLE + 6
    memory = rank_memory(make(expert=2, distributed_optimizer=True), 8)
    # 8 ranks hold the same dense parameters, 8 / 2 the same half of the experts
    assert memory.optimizer == 8 * (others / 8 + 2 * EXPERT / 4)
    assert memory.weights == 4 * (others + 2 * EXPERT)


def test_muon_keeps_one_moment_of_matrices_and_two_of_the_rest():
    config = make(tensor=2, expert=4).model_copy(update={"optimizer": OptimizerConfig(name="muon")})
    matrices, rest = 2 * ATTENTION + DENSE, 2 * TABLE  # split in two
    whole = 2 * NORMS + ROUTER + 6  # each rank has these
    expected = (4 * matrices + 8 * rest) / 2 + 8 * whole + 4 * EXPERT
    assert rank_memory(config, 4).optimizer == expected


@pytest.mark.parametrize(
    "model",
    [
        {"shared_expert_ffn_hidden_size": 5, "shared_expert_gate": True, "qkv_bias": True},
        {
            **{"kv_lora_rank": 5, "q_lora_rank": 7, "qk_nope_head_dim": 4, "qk_rope_head_dim": 2},
            **{"v_head_dim": 3, "head_dim": None, "num_query_groups": None, "qk_norm": True},
        },
    ],
    ids=["shared experts and biases", "latent attention"],
)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_muons_state_is_as_large_as_a_real_one(model, dtype):
    from tests.support.tiny_training import build_training

    config = Config(
        model={**SMALL, **model, "dtype": dtype},
        optimizer={"name": "muon"},
        device={"kind": "cpu", "threads": 1},
    )
    training = build_training(config)
    for parameter in training.chunks[0].parameters():
        parameter.main_grad.fill_(0.5)
    training.optimizer.step()
    held = 0
    for member in training.optimizer.chained_optimizers:
        for main, state in member.optimizer.state.items():
            held += sum(tensor.nbytes for tensor in state.values())
            held += main.nbytes if dtype == "bf16" else 0  # in fp32 it is the weight itself
    assert rank_memory(config, 1).optimizer == held > 0


def test_the_fullest_pipeline_stage_counts():
    first = ATTENTION + NORMS + DENSE + TABLE
    last = ATTENTION + NORMS + ROUTER + 4 * EXPERT + TABLE + 6
    assert first < last
    short = rank_memory(make(pipeline=2, pack_tokens=8), 2)
    assert (short.weights, short.head) == (4 * last, 12 * 8 * 20 + (8 * 8 + 20 * 4) * 6)
    # the first stage keeps the activations of two packs, which weigh more when packs are long
    config = make(pipeline=2, pack_tokens=100)
    few_words = config.model.model_copy(update={"vocab_size": config.model.vocab_size // 2})
    long = rank_memory(config.model_copy(update={"model": few_words}), 2)
    assert (long.weights, long.head) == (4 * (first - TABLE // 2), 0)
    parts = (long.weights, long.gradients, long.optimizer, long.activations, long.head)
    assert long.total == sum(parts)


def test_activations_by_hand():
    attention = 4 * 6 + 2 * (2 + 1) * 4  # 48
    dense, moe = attention + 3 * 10, attention + 2 * (2 * 6 + 3 * 3) + 2 * 4
    assert activation_bytes(make(), 0) == 100 * 4 * (dense + moe)
    assert activation_bytes(make(recompute="selective"), 0) == 100 * 4 * (dense + moe - 2 * 8)
    assert activation_bytes(make(recompute="full"), 0) == 100 * 4 * (2 * 6 + max(dense, moe))
    # 50 tokens a rank; the first of two stages keeps two packs of its one layer
    assert activation_bytes(make(tensor=2, pipeline=2), 0) == 50 * 4 * 2 * dense
    assert activation_bytes(make(tensor=2, pipeline=2), 1) == 50 * 4 * moe
    # bf16: the router's two rows of E stay fp32, which is twice as many elements
    assert activation_bytes(make("bf16"), 0) == 100 * 2 * (dense + moe + 2 * 4)


def test_virtual_stages_keep_more_packs():
    config = make(pipeline=2, virtual_pipeline=2)
    model = config.model.model_copy(update={"num_layers": 4, "moe_layer_freq": [0, 0, 0, 0]})
    config = config.model_copy(update={"model": model})
    dense = 4 * 6 + 2 * 3 * 4 + 3 * 10
    assert activation_bytes(config, 0) == 100 * 4 * (2 + 1 / 2) * 2 * dense


def test_the_output_layer_is_split_over_tensor_and_context():
    config = make(tensor=2, context=2)
    assert head_bytes(config) == 12 * 50 * 10 + (50 * 8 + 10 * 4) * 6
    wide = config.model.model_copy(update={"vocab_size": 2 * HEAD_TILE, "dtype": "bf16"})
    large = config.model_copy(update={"model": wide})
    assert head_bytes(large) == 8 * HEAD_TILE + (50 * 6 + HEAD_TILE * 2) * 6  # never 8 * 50 V


def test_the_tile_is_the_heads():
    from megatron_rl.parallel.vocab_tiles import TILE

    assert max(TILE.values()) == HEAD_TILE


def test_copies_of_experts_count_where_their_weights_travel():
    """Of all 4 experts: a copy in bf16, and its gradients in fp32 as computed and as received."""
    sent = rank_memory(make("bf16", expert=2, expert_exchange="tokens"), 2)
    copied = rank_memory(make("bf16", expert=2, expert_exchange="weights"), 2)
    assert sent.copies == 0 and copied.copies == 4 * EXPERT * (2 + 4 + 4)
    assert copied.total == sent.total + 4 * EXPERT * 10
    assert rank_memory(make(expert_tensor=2, tensor=2, expert_exchange="weights"), 2).copies == (
        4 * EXPERT * (4 + 4 + 4)
    )
    assert rank_memory(make(expert_exchange="weights"), 1).copies == 0  # nothing is split
    stages = make(expert=2, pipeline=2, expert_exchange="weights")
    assert [expert_copies_bytes(stages, stage) for stage in (0, 1)] == [0, 4 * EXPERT * 12]


def truncated(rollout, **parallel):
    whole = {"prompts_per_step": 6, "samples_per_prompt": 4, "keep_sampling_mask": True}
    config = {"model": SMALL | {"max_sequence_length": 256}, "parallel": parallel}
    return Config.model_validate({**config, "rollout": whole | rollout})


def test_kept_sets_of_a_batch():
    """6 x 4 answers of 50 tokens with 20 ids each, over 2 data x 2 context ranks: 300 tokens."""
    answers = {"max_new_tokens": 50, "top_k": 20}
    config = truncated(answers, context=2, tensor=2)
    assert kept_bytes(config, 8) == 300 * 20 * 16
    without = truncated({**answers, "keep_sampling_mask": False}, context=2, tensor=2)
    assert kept_bytes(without, 8) == 0
    assert rank_memory(config, 8).total == rank_memory(without, 8).total + 300 * 20 * 16
    # four answers a conversation, and one that is cut at the longest sequence
    talks = {**answers, "environment": "any", "max_turns": 4}
    assert kept_bytes(truncated(talks), 1) == 24 * 200 * 20 * 16
    assert kept_bytes(truncated(talks | {"max_turns": 9}), 1) == 24 * 256 * 20 * 16
    assert kept_bytes(truncated(answers | {"top_k": 0, "top_p": 0.9}), 1) == 0
    two = truncated(answers, pipeline=2, expert=1)
    assert rank_memory(two, 2).kept == 24 * 50 * 20 * 16  # of the last stage, which has the head


def test_a_kept_id_takes_as_many_bytes_as_a_real_one():
    import numpy as np
    import torch

    from megatron_rl.parallel.kept_words import KeptWords
    from megatron_rl.records import KeptTokens

    sets = KeptTokens.of_sizes(np.arange(12) % 4, np.array([4, 4, 4]))
    words = KeptWords.of(sets, torch.device("cpu"))
    answers = {"max_new_tokens": 3, "top_k": 4, "prompts_per_step": 1, "samples_per_prompt": 1}
    assert kept_bytes(truncated(answers), 1) == words.tokens.nbytes + words.columns.nbytes


def test_rows_of_check_name_what_is_counted():
    def rows(config):
        return dict(memory_rows(config, 2))

    assert not {"  copies of experts", "  kept tokens"} & rows(make(expert=2)).keys()
    copied = rows(make(expert=2, expert_exchange="weights"))
    assert copied["  copies of experts"] == "2.53 KiB, with their gradients"  # 4 x 54 x 12
    kept = rows(truncated({"max_new_tokens": 64, "top_k": 8, "samples_per_prompt": 16}))
    # 6 x 16 / 2 x 64 tokens
    assert kept["  kept tokens"] == "at most 384 KiB of a rollout batch"
    kept = rows(truncated({"top_k": 0, "top_p": 0.9}))
    assert kept["  kept tokens"] == "as many as top_p keeps"
