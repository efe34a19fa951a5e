"""Cross-field rules: what each refuses, in which words, and that the rest passes."""

from pathlib import Path

import pytest

from megatron_rl.config.checks import best_checkpoints_are_evaluated, check_config
from megatron_rl.config.layout import (
    data_parallel_size,
    expert_data_parallel_size,
    moe_layers,
    smallest_world,
    stage_layers,
)
from megatron_rl.config.presets import MODEL_PRESETS
from megatron_rl.config.schema import Config, ModelConfig, ParallelConfig
from megatron_rl.errors import UserError


def make(preset="tiny_moe", **sections):
    """A config of a preset's model; each section's fields given as a dict."""
    model = {**MODEL_PRESETS[preset], **sections.pop("model", {})}
    return Config.model_validate({"model": model, **sections})


def refusal(config, world_size=None, verb="train"):
    """The message a config is refused with."""
    with pytest.raises(UserError) as error:
        check_config(config, world_size, verb, files=False)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("checkpoint", "evaluate", "message"),
    [
        ({"every": 0}, {"every": 5}, "checkpoint.keep_best is 2 with checkpoint.every 0 and eval"),
        ({}, {"every": 0}, "checkpoint.keep_best is 2 with checkpoint.every 10 and evaluate.every"),
        (
            {"best_metric": "eval/mean@k"},
            {"every": 5, "samples": 0},
            "checkpoint.best_metric is eval/mean@k with evaluate.samples 0; expected samples above",
        ),
    ],
)
def test_the_best_have_to_be_evaluated(checkpoint, evaluate, message):
    data = {"eval": "eval.jsonl"}
    config = Config(checkpoint={"keep_best": 2, **checkpoint}, evaluate=evaluate, data=data)
    with pytest.raises(UserError) as error:
        best_checkpoints_are_evaluated(config)
    assert str(error.value).startswith(message)
    best_checkpoints_are_evaluated(
        Config(checkpoint={"keep_best": 2}, evaluate={"every": 5}, data=data)
    )
    with pytest.raises(UserError, match="keep_best is 2 and data.eval is not given"):
        best_checkpoints_are_evaluated(Config(checkpoint={"keep_best": 2}, evaluate={"every": 5}))
    best_checkpoints_are_evaluated(Config(evaluate={"every": 0}))


@pytest.mark.parametrize("preset", MODEL_PRESETS)
def test_presets_pass(preset):
    longest = MODEL_PRESETS[preset]["max_sequence_length"]
    algorithm = {"name": "rspo" if MODEL_PRESETS[preset]["num_experts"] else "gmpo"}
    config = make(preset, data={"pack_tokens": longest}, algorithm=algorithm)
    for verb in ("train", "sft", "evaluate", "generate"):
        check_config(config, None, verb, files=False)
        check_config(config, 1, verb, files=False)


SPLIT = {"tensor": 2, "pipeline": 2, "virtual_pipeline": 2, "expert": 2}


def test_a_fully_split_layout_passes():
    config = make(parallel=SPLIT)
    for ranks in (4, 8, 16):
        check_config(config, ranks, "train", files=False)


LATENT = {
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "num_query_groups": None,
    "head_dim": None,
}
MODEL_MISTAKES = [
    (
        {"head_dim": None, "hidden_size": 130},
        "model.hidden_size 130 is no multiple of model.num_attention_heads 4; "
        "expected a multiple, or model.head_dim given",
    ),
    ({"head_dim": 31}, "model.head_dim is 31; expected an even number"),
    ({"head_dim": None, "hidden_size": 132}, "model.head_dim is 33; expected an even number"),
    (
        {"num_query_groups": 3},
        "model.num_query_groups 3 does not divide model.num_attention_heads 4",
    ),
    ({"num_experts": 1}, "model.num_experts is 1; expected 2 or more, or 0 for a dense model"),
    ({"v_head_dim": 8}, "model.v_head_dim 8 is given without model.kv_lora_rank"),
    ({"kv_lora_rank": 8}, "model.kv_lora_rank 8 is given without model.qk_nope_head_dim"),
    (
        {**LATENT, "num_query_groups": 2},
        "model.num_query_groups is 2 with latent attention (model.kv_lora_rank); expected null",
    ),
    ({**LATENT, "qk_norm": False}, "model.qk_norm is False with latent attention"),
    ({**LATENT, "qk_rope_head_dim": 3}, "model.qk_rope_head_dim is 3; expected an even number"),
    (
        {"moe_top_k": 9},
        "model.moe_top_k 9 is above model.num_experts 8; expected at most that; lower "
        "model.moe_top_k",
    ),
    ({"moe_top_k": 1}, "model.moe_top_k is 1 and model.router_pre_softmax false"),
    (
        {"router_num_groups": 4},
        "model.router_num_groups is 4 and model.router_group_top_k is None; expected both or "
        "neither",
    ),
    (
        {"router_num_groups": 3, "router_group_top_k": 1},
        "model.router_num_groups 3 does not divide model.num_experts 8",
    ),
    (
        {"router_num_groups": 2, "router_group_top_k": 3},
        "model.router_group_top_k is 3 of 2 groups of 4 experts",
    ),
    (
        {"router_num_groups": 8, "router_group_top_k": 1},
        "model.router_group_top_k is 1 of 8 groups of 1 experts; expected at most 8 groups "
        "holding at least model.moe_top_k 2 experts",
    ),
    (
        {"router_num_groups": 4, "router_group_top_k": 3},
        "model.router_group_top_k 3 is above model.moe_top_k 2",
    ),
    (
        {"moe_layer_freq": [0, 1, 1]},
        "model.moe_layer_freq has 3 entries, 2 of them 1; expected model.num_layers 4 entries",
    ),
    ({"moe_layer_freq": [0, 0, 0, 0]}, "model.moe_layer_freq has 4 entries, 0 of them 1"),
    (
        {"router_expert_bias": True},
        "model.router_expert_bias is on with model.router_score softmax",
    ),
    (
        {"expert_bias_update_rate": 0.001},
        "model.expert_bias_update_rate is 0.001 without an expert bias",
    ),
    (
        {"router_pre_softmax": True, "router_score": "sigmoid"},
        "model.router_pre_softmax is on with model.router_score sigmoid",
    ),
    ({"shared_expert_gate": True}, "model.shared_expert_gate is on without a shared expert"),
    (
        {"freeze_router": True, "aux_loss_coeff": 0.01},
        "model.freeze_router is on with model.aux_loss_coeff 0.01; expected 0",
    ),
]


@pytest.mark.parametrize(("fields", "message"), MODEL_MISTAKES)
def test_an_impossible_model_is_refused(fields, message):
    assert refusal(make(model=fields)).startswith(message)


def test_top_1_passes_with_softmax_over_all_experts():
    config = make(model={"moe_top_k": 1, "router_pre_softmax": True})
    check_config(config, 1, "train", files=False)


@pytest.mark.parametrize(
    ("parallel", "model", "world_size", "message"),
    [
        (
            {"tensor": 3},
            {},
            3,
            "model.num_attention_heads 4 is no multiple of parallel.tensor 3; expected a multiple",
        ),
        (
            {"tensor": 4},
            {},
            4,
            "model.num_query_groups 2 is no multiple of parallel.tensor 4; expected a multiple",
        ),
        (
            {"tensor": 2},
            {"ffn_hidden_size": 255},
            2,
            "model.ffn_hidden_size 255 is no multiple of parallel.tensor 2",
        ),
        (
            {"tensor": 2},
            {"shared_expert_ffn_hidden_size": 33},
            2,
            "model.shared_expert_ffn_hidden_size 33 is no multiple",
        ),
        (
            {"expert_tensor": 2},
            {"moe_ffn_hidden_size": 127},
            2,
            "model.moe_ffn_hidden_size 127 is no multiple of parallel.expert_tensor 2",
        ),
        (
            {"expert": 2},
            {"num_experts": 0},
            2,
            "parallel.expert is 2 with a dense model (model.num_experts 0); expected 1",
        ),
        (
            {"tensor": 2},
            {**LATENT, "kv_lora_rank": 9},
            2,
            "model.kv_lora_rank + qk_rope_head_dim 13 is no multiple of parallel.tensor 2",
        ),
        (
            {"expert": 2, "expert_exchange": "weights", "dispatcher": "allgather"},
            {},
            2,
            "found parallel.expert_exchange weights with parallel.dispatcher allgather; expected "
            "alltoall; change one of them",
        ),
        ({"expert": 3}, {}, 3, "model.num_experts 8 is no multiple of parallel.expert 3"),
        (
            {"virtual_pipeline": 2},
            {},
            1,
            "parallel.virtual_pipeline is 2 with parallel.pipeline 1; expected more than one",
        ),
        (
            {"pipeline": 3},
            {},
            3,
            "model.num_layers 4 is no multiple of 3 = parallel.pipeline 3 x virtual_pipeline 1",
        ),
        (
            {"pipeline": 2, "virtual_pipeline": 4},
            {},
            2,
            "model.num_layers 4 is no multiple of 8 = parallel.pipeline 2 x virtual_pipeline 4",
        ),
        ({"dispatcher": "flex"}, {}, 1, "parallel.dispatcher is flex with device.kind auto"),
        (
            {"tensor": 2, "pipeline": 2},
            {},
            6,
            "6 ranks for tensor 2 x pipeline 2 x context 1; expected a multiple of 4; use 4 ranks",
        ),
        (
            {"tensor": 2, "expert": 4},
            {},
            6,
            "6 ranks for pipeline 1 x expert 4 x expert_tensor 1; expected a multiple of 4; use 4",
        ),
        (
            {"tensor": 2, "expert": 2},
            {},
            1,
            "found 1 rank; the config's parallel section needs 2; start it with: "
            "torchrun --nproc-per-node 2 -m megatron_rl train CONFIG",
        ),
        (
            {"world_size": 8},
            {},
            1,
            "found 1 rank; the config's parallel section needs 8; start it with: "
            "torchrun --nproc-per-node 8 -m megatron_rl train CONFIG",
        ),
        (
            {"world_size": 3, "expert": 2},
            {},
            1,
            "3 ranks for pipeline 1 x expert 2 x expert_tensor 1; expected a multiple of 2; use 2",
        ),
        (
            {"world_size": 8},
            {},
            4,
            "found 4 ranks; parallel.world_size is 8; expected them equal",
        ),
        (
            {"world_size": 3, "tensor": 2},
            {},
            None,
            "3 ranks for tensor 2 x pipeline 1 x context 1; expected a multiple of 2",
        ),
    ],
)
def test_an_impossible_layout_is_refused(parallel, model, world_size, message):
    assert refusal(make(parallel=parallel, model=model), world_size).startswith(message)


def test_cuda_only_choices():
    flex = make(parallel={"dispatcher": "flex"}, device={"kind": "cuda"})
    check_config(flex, 1, "train", files=False)
    both = {"model": {"transformer_engine": True}, "device": {"kind": "cuda"}}
    assert refusal(make(**both, data={"share_prompts": "on"})).startswith(
        "data.share_prompts is on with model.transformer_engine true"
    )
    engine = make(model={"transformer_engine": True}, device={"kind": "cpu"})
    assert refusal(engine).startswith("model.transformer_engine is on with device.kind cpu")


@pytest.mark.parametrize(
    ("sections", "world_size", "message"),
    [
        (
            {"rollout": {"prompts_per_step": 6}},
            4,
            "rollout.prompts_per_step 6 is no multiple of the data-parallel size 4",
        ),
        (
            {"rollout": {"prompts_per_step": 12}, "algorithm": {"mini_batches": 2}},
            4,
            "3 prompts a data-parallel rank are no multiple of algorithm.mini_batches 2; "
            "expected a multiple, since a group is never split",
        ),
        (
            {"rollout": {"samples_per_prompt": 1}},
            1,
            "rollout.samples_per_prompt is 1: its advantage is always 0",
        ),
        (
            {"rollout": {"max_new_tokens": 256}},
            1,
            "rollout.max_new_tokens 256 leaves no room for the prompt in "
            "model.max_sequence_length 256; expected less",
        ),
        (
            {"data": {"pack_tokens": 192}},
            1,
            "data.pack_tokens 192 is below model.max_sequence_length 256; expected at least that",
        ),
        (
            {"data": {"pack_tokens": 300}},
            1,
            "data.pack_tokens 300 is no multiple of data.pack_multiple 32",
        ),
        (
            {"data": {"pack_multiple": 8, "pack_tokens": 256}, "parallel": {"context": 8}},
            8,
            "data.pack_multiple 8 is no multiple of 16 = tensor x 2 context",
        ),
        (
            {"optimizer": {"lr": 1e-6, "min_lr": 1e-5}},
            1,
            "optimizer.min_lr 1e-05 is above optimizer.lr 1e-06",
        ),
        (
            {"algorithm": {"name": "rspoo"}},
            1,
            "algorithm.name is 'rspoo' (did you mean rspo?); expected one of grpo, ",
        ),
        (
            {"algorithm": {"advantages": "group_nrm"}},
            1,
            "algorithm.advantages is 'group_nrm' (did you mean group_norm?); expected one of ",
        ),
        (
            {"reward": {"name": "maths"}},
            1,
            "reward.name is 'maths' (did you mean math?); expected one of countdown, math, code",
        ),
    ],
)
def test_an_impossible_run_is_refused(sections, world_size, message):
    assert refusal(make(**sections), world_size).startswith(message)


def test_tensor_and_pipeline_ranks_share_prompts():
    """8 ranks with tensor 2 and pipeline 2 are 2 replicas: 3 of 6 prompts each."""
    config = make(
        parallel={"tensor": 2, "pipeline": 2},
        rollout={"prompts_per_step": 6},
        algorithm={"mini_batches": 3},
    )
    check_config(config, 8, "train", files=False)
    assert "4 is no multiple" not in refusal(config, 16)
    assert refusal(config, 16).startswith("rollout.prompts_per_step 6 is no multiple of")


def test_rules_of_other_verbs_do_not_apply():
    config = make(rollout={"prompts_per_step": 7}, train={"batch_size": 8}, algorithm={"name": "x"})
    check_config(config, 4, "sft", files=False)
    check_config(config, 4, "evaluate", files=False)
    odd = make(train={"batch_size": 6})
    assert refusal(odd, 4, "sft").startswith(
        "train.batch_size 6 is no multiple of the data-parallel"
    )
    check_config(odd, 4, "train", files=False)


def test_files_are_needed_by_verb(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("tokenizer.model", "train.jsonl", "eval.jsonl"):
        Path(name).touch()
    data = {"tokenizer": {"path": "tokenizer.model"}, "train": "train.jsonl", "eval": "eval.jsonl"}
    for verb in ("train", "sft", "evaluate", "generate"):
        check_config(make(data=data), 1, verb)

    def message(verb, data, **sections):
        with pytest.raises(UserError) as error:
            check_config(make(data=data, **sections), 1, verb)
        return str(error.value)

    assert message("generate", {**data, "tokenizer": {}}) == (
        "data.tokenizer.path is not given; expected a path, which generate needs; "
        "set --data.tokenizer.path"
    )
    check_config(make(data={**data, "eval": None}), 1, "train")
    check_config(make(data={**data, "eval": None}), 1, "sft")
    assert message("evaluate", {**data, "eval": None}).startswith("data.eval is not given")
    assert message("train", {**data, "train": "no.jsonl"}) == (
        "data.train: no.jsonl does not exist; expected a path from the current directory "
        f"({tmp_path})"
    )
    assert message("sft", {**data, "eval": "no.jsonl"}).startswith("data.eval: no.jsonl does not")
    check_config(make(data={**data, "train": "no.jsonl"}), 1, "evaluate")
    assert message("generate", data, checkpoint={"init_from": "runs/old"}).startswith(
        "checkpoint.init_from: runs/old does not exist"
    )
    assert message("train", data, run_dir="train.jsonl") == (
        "run_dir train.jsonl is a file; expected a directory or a new name"
    )


def test_layout_arithmetic():
    layout = ParallelConfig(tensor=2, pipeline=2, context=3, expert=4, expert_tensor=1)
    assert smallest_world(layout) == 24  # 2 stages x lcm(6, 4)
    assert data_parallel_size(layout, 48) == 4
    assert expert_data_parallel_size(layout, 48) == 6
    assert moe_layers(ModelConfig(num_layers=5, moe_layer_freq=2)) == [
        True,
        False,
        True,
        False,
        True,
    ]
    interleaved = ParallelConfig(pipeline=2, virtual_pipeline=2)
    assert stage_layers(8, interleaved) == [[0, 1, 4, 5], [2, 3, 6, 7]]
    assert stage_layers(4, ParallelConfig(pipeline=2)) == [[0, 1], [2, 3]]
