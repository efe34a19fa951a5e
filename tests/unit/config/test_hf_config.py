"""Hugging Face config.json -> ModelConfig: both spellings, six families, and what is refused."""

import json

import pytest

from megatron_rl.config.hf_config import read_hf_config
from megatron_rl.config.layout import heads_of
from megatron_rl.config.load import load_config
from megatron_rl.config.presets import MODEL_PRESETS
from megatron_rl.config.schema import ModelConfig
from megatron_rl.errors import UserError

#: Qwen/Qwen3-30B-A3B as published (transformers 4 spelling).
QWEN3 = json.loads("""{
  "architectures": ["Qwen3MoeForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
  "bos_token_id": 151643, "decoder_sparse_step": 1, "eos_token_id": 151645, "head_dim": 128,
  "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02, "intermediate_size": 6144,
  "max_position_embeddings": 40960, "max_window_layers": 48, "mlp_only_layers": [],
  "model_type": "qwen3_moe", "moe_intermediate_size": 768, "norm_topk_prob": true,
  "num_attention_heads": 32, "num_experts": 128, "num_experts_per_tok": 8,
  "num_hidden_layers": 48, "num_key_value_heads": 4, "output_router_logits": false,
  "rms_norm_eps": 1e-06, "rope_scaling": null, "rope_theta": 1000000.0,
  "router_aux_loss_coef": 0.001, "sliding_window": null, "tie_word_embeddings": false,
  "torch_dtype": "bfloat16", "transformers_version": "4.51.0", "use_cache": true,
  "use_sliding_window": false, "vocab_size": 151936}""")

#: Qwen/Qwen1.5-MoE-A2.7B: a window's width beside the switch that turns it off.
QWEN2 = json.loads("""{
  "architectures": ["Qwen2MoeForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643,
  "eos_token_id": 151643, "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02,
  "intermediate_size": 5632, "max_position_embeddings": 8192, "max_window_layers": 21,
  "model_type": "qwen2_moe", "num_attention_heads": 16, "num_hidden_layers": 24,
  "num_key_value_heads": 16, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0,
  "sliding_window": 32768, "tie_word_embeddings": false, "torch_dtype": "bfloat16",
  "use_cache": true, "use_sliding_window": false, "vocab_size": 151936, "decoder_sparse_step": 1,
  "moe_intermediate_size": 1408, "shared_expert_intermediate_size": 5632,
  "num_experts_per_tok": 4, "num_experts": 60, "norm_topk_prob": false,
  "output_router_logits": false, "router_aux_loss_coef": 0.001}""")

#: mistralai/Mixtral-8x7B-v0.1
MIXTRAL = json.loads("""{
  "architectures": ["MixtralForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 1,
  "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02,
  "intermediate_size": 14336, "max_position_embeddings": 32768, "model_type": "mixtral",
  "num_attention_heads": 32, "num_experts_per_tok": 2, "num_hidden_layers": 32,
  "num_key_value_heads": 8, "num_local_experts": 8, "output_router_logits": false,
  "rms_norm_eps": 1e-05, "rope_theta": 1000000.0, "router_aux_loss_coef": 0.02,
  "sliding_window": null, "tie_word_embeddings": false, "torch_dtype": "bfloat16",
  "use_cache": true, "vocab_size": 32000}""")

#: allenai/OLMoE-1B-7B-0924
OLMOE = json.loads("""{
  "architectures": ["OlmoeForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
  "clip_qkv": null, "eos_token_id": 50279, "hidden_act": "silu", "hidden_size": 2048,
  "initializer_range": 0.02, "intermediate_size": 1024, "max_position_embeddings": 4096,
  "model_type": "olmoe", "norm_topk_prob": false, "num_attention_heads": 16, "num_experts": 64,
  "num_experts_per_tok": 8, "num_hidden_layers": 16, "num_key_value_heads": 16,
  "output_router_logits": false, "pad_token_id": 1, "rms_norm_eps": 1e-05, "rope_scaling": null,
  "rope_theta": 10000.0, "router_aux_loss_coef": 0.01, "tie_word_embeddings": false,
  "torch_dtype": "bfloat16", "use_cache": true, "vocab_size": 50304}""")

#: deepseek-ai/DeepSeek-V3-Base but for its FP8 weights, which are refused.
DEEPSEEK = json.loads("""{
  "architectures": ["DeepseekV3ForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
  "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"}, "aux_loss_alpha": 0.001,
  "bos_token_id": 0, "eos_token_id": 1, "ep_size": 1, "first_k_dense_replace": 3,
  "hidden_act": "silu", "hidden_size": 7168, "initializer_range": 0.02,
  "intermediate_size": 18432, "kv_lora_rank": 512, "max_position_embeddings": 163840,
  "model_type": "deepseek_v3", "moe_intermediate_size": 2048, "moe_layer_freq": 1, "n_group": 8,
  "n_routed_experts": 256, "n_shared_experts": 1, "norm_topk_prob": true,
  "num_attention_heads": 128, "num_experts_per_tok": 8, "num_hidden_layers": 61,
  "num_key_value_heads": 128, "num_nextn_predict_layers": 1, "pretraining_tp": 1,
  "q_lora_rank": 1536, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "rms_norm_eps": 1e-06,
  "rope_scaling": {"beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0,
    "mscale_all_dim": 1.0, "original_max_position_embeddings": 4096, "type": "yarn"},
  "rope_theta": 10000, "routed_scaling_factor": 2.5, "scoring_func": "sigmoid", "seq_aux": true,
  "tie_word_embeddings": false, "topk_group": 4, "topk_method": "noaux_tc",
  "torch_dtype": "bfloat16", "transformers_version": "4.33.1", "use_cache": true,
  "v_head_dim": 128, "vocab_size": 129280}""")

#: Qwen/Qwen3-4B
DENSE = json.loads("""{
  "architectures": ["Qwen3ForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
  "bos_token_id": 151643, "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu",
  "hidden_size": 2560, "initializer_range": 0.02, "intermediate_size": 9728,
  "max_position_embeddings": 40960, "max_window_layers": 36, "model_type": "qwen3",
  "num_attention_heads": 32, "num_hidden_layers": 36, "num_key_value_heads": 8,
  "rms_norm_eps": 1e-06, "rope_scaling": null, "rope_theta": 1000000, "sliding_window": null,
  "tie_word_embeddings": true, "torch_dtype": "bfloat16", "transformers_version": "4.51.0",
  "use_cache": true, "use_sliding_window": false, "vocab_size": 151936}""")

PUBLISHED = {
    "qwen3_30b_a3b": QWEN3,
    "qwen1_5_moe_a2_7b": QWEN2,
    "mixtral_8x7b": MIXTRAL,
    "olmoe_1b_7b": OLMOE,
    "deepseek_v3": DEEPSEEK,
    "qwen3_4b": DENSE,
}


@pytest.fixture
def read(tmp_path):
    """Write a config.json and read its directory."""

    def read_values(values, **changes):
        (tmp_path / "config.json").write_text(json.dumps({**values, **changes}), encoding="utf-8")
        return read_hf_config(tmp_path)

    return read_values


def _resolved(fields):
    """The model with head_dim written out, to compare a preset with a file that leaves it open."""
    model = ModelConfig(**fields)
    return model.model_copy(update={"head_dim": heads_of(model)[2]})


@pytest.mark.parametrize("preset", PUBLISHED)
def test_published_files_give_the_presets(read, preset):
    assert _resolved(read(PUBLISHED[preset])) == _resolved(MODEL_PRESETS[preset])


@pytest.mark.parametrize("preset", PUBLISHED)
def test_both_spellings_give_the_same(read, preset):
    old = PUBLISHED[preset]
    new = {k: v for k, v in old.items() if k not in ("rope_theta", "rope_scaling", "torch_dtype")}
    new["rope_parameters"] = {"rope_theta": old["rope_theta"], "rope_type": "default"}
    if preset == "deepseek_v3":
        scaling = {k: v for k, v in old["rope_scaling"].items() if k != "type"}
        new["rope_parameters"] |= {"rope_type": "yarn", **scaling}
    new["dtype"] = "bfloat16"
    if preset == "qwen3_30b_a3b":
        new["num_local_experts"] = new.pop("num_experts")
    if preset == "qwen1_5_moe_a2_7b":
        new.update(qkv_bias=True, layer_types=["full_attention"] * 24, mlp_only_layers=[])
    assert read(new) == read(old)


def test_files_written_by_transformers_are_understood(tmp_path):
    import transformers

    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "vocab_size": 96, "num_experts_per_tok": 2}
    for name in ("Qwen3Moe", "Qwen2Moe", "Mixtral", "Olmoe", "Qwen3"):
        dense = {k: v for k, v in sizes.items() if name != "Qwen3" or "experts" not in k}
        getattr(transformers, f"{name}Config")(**dense).save_pretrained(tmp_path)
        fields = read_hf_config(tmp_path)
        assert (fields["hidden_size"], fields["num_layers"]) == (64, 2), name
        assert (fields["num_query_groups"], fields["vocab_size"]) == (2, 96), name
        assert fields.get("router_pre_softmax", False) is (name not in ("Mixtral", "Qwen3")), name
        ModelConfig(**fields)
    sizes |= {"num_key_value_heads": 4, "num_experts_per_tok": 8}
    transformers.DeepseekV3Config(**sizes).save_pretrained(tmp_path)
    model = ModelConfig(**read_hf_config(tmp_path))
    assert (model.hidden_size, model.kv_lora_rank, model.q_lora_rank) == (64, 512, 1536)
    assert (model.num_experts, model.router_num_groups, model.router_group_top_k) == (256, 8, 4)


def test_dense_layers_of_qwen(read):
    assert read(QWEN3, num_hidden_layers=4)["moe_layer_freq"] == 1
    assert read(QWEN3, num_hidden_layers=4, mlp_only_layers=[0, 2])["moe_layer_freq"] == [
        0,
        1,
        0,
        1,
    ]
    assert read(QWEN3, num_hidden_layers=5, decoder_sparse_step=2)["moe_layer_freq"] == [
        0,
        1,
        0,
        1,
        0,
    ]


def test_renormalised_top_k_is_softmax_after_top_k(read):
    assert read(QWEN3, norm_topk_prob=True)["router_pre_softmax"] is False
    assert read(QWEN3, norm_topk_prob=False)["router_pre_softmax"] is True


def test_dtype_and_tied_embeddings_are_taken(read):
    fields = read(QWEN3, torch_dtype="float32", tie_word_embeddings=True)
    assert (fields["dtype"], fields["tie_embeddings"]) == ("fp32", True)
    without = {k: v for k, v in QWEN3.items() if k not in ("torch_dtype", "tie_word_embeddings")}
    fields = read(without)
    assert "dtype" not in fields and fields["tie_embeddings"] is False


@pytest.mark.parametrize(
    ("values", "changes", "found"),
    [
        (
            QWEN3,
            {"model_type": "qwen3_mo"},
            "model_type 'qwen3_mo' is not supported (did you mean qwen3_moe",
        ),
        (QWEN3, {"model_type": None}, "model_type None is not supported"),
        (
            QWEN3,
            {"rope_scaling": {"type": "yarn", "factor": 4.0}},
            "rope_type 'yarn' (rope scaling) is not supported",
        ),
        (
            QWEN3,
            {"rope_theta": None, "rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6}},
            "rope_type 'yarn' (rope scaling) is not supported",
        ),
        (
            QWEN3,
            {"rope_parameters": {"full_attention": {"rope_theta": 1e6}}},
            "rope_parameters.full_attention (rope scaling) is not supported",
        ),
        (
            DEEPSEEK,
            {"rope_scaling": {**DEEPSEEK["rope_scaling"], "type": "linear"}},
            "rope_type 'linear' (rope scaling) is not supported",
        ),
        (
            DEEPSEEK,
            {"rope_scaling": {**DEEPSEEK["rope_scaling"], "mscale": None}},
            "yarn's mscale is missing or 0",
        ),
        (
            DEEPSEEK,
            {"rope_scaling": {**DEEPSEEK["rope_scaling"], "truncate": False}},
            "yarn's truncate False is not supported",
        ),
        (DEEPSEEK, {"topk_group": 2}, "topk_group 2 with num_experts_per_tok 8 is not supported"),
        (DEEPSEEK, {"norm_topk_prob": False}, "norm_topk_prob false with sigmoid scores is not"),
        (DEEPSEEK, {"scoring_func": "softmax"}, "scoring_func 'softmax' is not supported"),
        (DEEPSEEK, {"rope_interleave": False}, "rope_interleave False is not supported"),
        (DEEPSEEK, {"num_key_value_heads": 8}, "num_key_value_heads other than num_attention_h"),
        (DEEPSEEK, {"quantization_config": {"quant_method": "fp8"}}, "quantization_config {'quan"),
        (
            QWEN3,
            {"rope_parameters": {"rope_theta": 1e4}},
            "rope_theta=1000000.0 and rope_parameters.rope_theta=10000.0 contradict",
        ),
        (QWEN3, {"rope_theta": None}, "rope_theta or rope_parameters.rope_theta is missing"),
        (QWEN3, {"num_local_experts": 64}, "num_experts=128 and num_local_experts=64 contradict"),
        (QWEN3, {"attention_bias": True}, "attention_bias True is not supported"),
        (QWEN3, {"use_sliding_window": True}, "use_sliding_window True is not supported"),
        (
            QWEN2,
            {"use_sliding_window": True, "sliding_window": 4096},
            "sliding_window 4096 is not supported",
        ),
        (MIXTRAL, {"sliding_window": 4096}, "sliding_window 4096 is not supported"),
        (MIXTRAL, {"router_jitter_noise": 0.1}, "router_jitter_noise 0.1 is not supported"),
        (OLMOE, {"clip_qkv": 8.0}, "clip_qkv 8.0 is not supported"),
        (OLMOE, {"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported"),
        (QWEN3, {"attention_dropout": 0.1}, "attention_dropout 0.1 is not supported"),
        (QWEN3, {"quantization_config": {"quant_method": "fp8"}}, "quantization_config {'quant"),
        (
            QWEN2,
            {"layer_types": ["sliding_attention"] * 24},
            "layer_types other than full_attention",
        ),
        (QWEN3, {"torch_dtype": "float16"}, "dtype 'float16' is not supported"),
        (QWEN3, {"num_mtp_layers": 1}, "num_mtp_layers 1 is not supported"),
        (QWEN3, {"num_memory_layers": 0}, "key 'num_memory_layers' is not understood"),
        (QWEN3, {"rms_norm_eps": None}, "rms_norm_eps is missing"),
        (
            QWEN2,
            {"shared_expert_intermediate_size": None},
            "shared_expert_intermediate_size is missing",
        ),
        (
            QWEN3,
            {"mlp_only_layers": 3},
            "mlp_only_layers is 3 (it should be a valid list)",
        ),
    ],
)
def test_what_is_not_implemented_is_refused(read, tmp_path, values, changes, found):
    with pytest.raises(UserError) as error:
        read(values, **changes)
    assert str(error.value).startswith(f"{tmp_path / 'config.json'}: {found}")
    assert str(error.value).endswith(
        "; expected a plain config.json of deepseek_v3, mixtral, olmoe, qwen2_moe, qwen3, qwen3_moe"
        ", or one of a family of your own (model.family)"
    )


def test_files_that_are_no_config_are_refused(tmp_path):
    path = tmp_path / "config.json"
    with pytest.raises(UserError, match="cannot read .*config.json \\(No such file"):
        read_hf_config(path)
    path.write_text("{", encoding="utf-8")
    with pytest.raises(UserError, match="config.json: not valid JSON"):
        read_hf_config(path)
    path.write_text("[1]", encoding="utf-8")
    with pytest.raises(UserError, match="config.json: found a list; expected a JSON object"):
        read_hf_config(path)


def test_the_file_is_below_yaml_and_its_mistakes_are_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hf").mkdir()
    (tmp_path / "run.yaml").write_text(
        "model:\n  hf_config: hf\n  num_layers: 2\n", encoding="utf-8"
    )
    (tmp_path / "hf" / "config.json").write_text(json.dumps(QWEN3), encoding="utf-8")
    model = load_config(tmp_path / "run.yaml").model
    assert (model.num_layers, model.num_experts, model.rope_base) == (2, 128, 1e6)
    (tmp_path / "hf" / "config.json").write_text(json.dumps({**QWEN3, "vocab_size": "many"}))
    with pytest.raises(UserError) as error:
        load_config(tmp_path / "run.yaml")
    assert str(error.value).startswith(
        "hf/config.json: vocab_size is 'many' (it should be a valid integer); expected a plain"
    )
