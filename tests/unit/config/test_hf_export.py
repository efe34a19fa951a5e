"""ModelConfig -> config.json: read back it is the same architecture, and transformers takes it."""

import pytest

from megatron_rl.config.hf_config import fields_of_values
from megatron_rl.config.hf_export import check_describes, hf_config_of
from megatron_rl.config.presets import MODEL_PRESETS
from megatron_rl.config.schema import ModelConfig
from megatron_rl.errors import UserError

MODELS = {
    "qwen3_moe": ModelConfig(head_dim=64, moe_layer_freq=[0, 1, 1, 0], router_pre_softmax=True),
    "mixtral": ModelConfig(qk_norm=False, num_query_groups=2, dtype="bf16"),
    "olmoe": ModelConfig(qk_norm_scope="layer", tie_embeddings=True),
    "qwen3": ModelConfig(num_experts=0, tie_embeddings=True),
    "deepseek_v3": ModelConfig(**MODEL_PRESETS["tiny_deepseek_moe"]),
    "qwen2_moe": ModelConfig(
        qk_norm=False, qkv_bias=True, shared_expert_ffn_hidden_size=40, shared_expert_gate=True
    ),
}


@pytest.mark.parametrize("family", MODELS)
def test_reads_back_as_the_same_model(family):
    model = MODELS[family]
    values = hf_config_of(model)
    assert values["model_type"] == family
    again = ModelConfig(**fields_of_values(values))
    fields = ["num_layers", "num_experts", "vocab_size"]
    fields += ["moe_top_k", "moe_ffn_hidden_size"] if model.num_experts else []
    for field in fields:
        assert getattr(again, field) == getattr(model, field)
    assert again.router_pre_softmax == model.router_pre_softmax
    assert again.tie_embeddings == model.tie_embeddings and again.dtype == model.dtype
    assert again.max_sequence_length == model.max_sequence_length
    assert again.kv_lora_rank == model.kv_lora_rank and again.yarn == model.yarn
    if family == "qwen3_moe":
        assert again.moe_layer_freq == [0, 1, 1, 0] and again.ffn_hidden_size == 256


@pytest.mark.parametrize("family", MODELS)
def test_transformers_reads_the_same_numbers(family):
    from transformers import AutoConfig

    model, values = MODELS[family], hf_config_of(MODELS[family])
    config = AutoConfig.for_model(**values)
    assert config.architectures[0].startswith(type(config).__name__.removesuffix("Config"))
    if model.num_experts:
        experts = getattr(config, "num_experts", None) or config.num_local_experts
        assert (experts, config.num_experts_per_tok) == (model.num_experts, model.moe_top_k)
        width = getattr(config, "moe_intermediate_size", None) or config.intermediate_size
        assert width == model.moe_ffn_hidden_size
    assert config.rope_parameters["rope_theta"] == model.rope_base
    assert (config.hidden_size, config.vocab_size) == (model.hidden_size, model.vocab_size)
    assert config.num_key_value_heads == (model.num_query_groups or model.num_attention_heads)


@pytest.mark.parametrize(
    "preset, family",
    [
        ("qwen3_30b_a3b", "qwen3_moe"),
        ("qwen1_5_moe_a2_7b", "qwen2_moe"),
        ("mixtral_8x7b", "mixtral"),
        ("olmoe_1b_7b", "olmoe"),
        ("deepseek_v3", "deepseek_v3"),
        ("moonlight_16b_a3b", "deepseek_v3"),
        ("qwen3_4b", "qwen3"),
    ],
)
def test_presets_are_of_their_family(preset, family):
    model = ModelConfig(**MODEL_PRESETS[preset])
    values = hf_config_of(model)
    assert values["model_type"] == family
    assert ModelConfig(**fields_of_values(values)).yarn == model.yarn


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"router_score": "sigmoid"}, "the nearest, qwen3_moe, has no model.router_score sigmoid"),
        ({"qkv_bias": True}, "has no model.qkv_bias True"),
        # which DeepSeek-V3, whose heads have a key each, refuses to say at all
        ({"qkv_bias": True, "num_query_groups": 2}, "nearest, qwen3_moe, has no model.qkv_bias"),
        ({"shared_expert_ffn_hidden_size": 8}, "has no model.shared_expert_ffn_hidden_size 8"),
    ],
)
def test_what_no_family_describes_is_refused(changes, message):
    with pytest.raises(UserError, match=message):
        hf_config_of(ModelConfig(**changes))


def test_a_directory_of_another_model_is_refused(tmp_path):
    import json

    values = hf_config_of(MODELS["mixtral"])
    (tmp_path / "config.json").write_text(json.dumps(values))
    check_describes(tmp_path, MODELS["mixtral"].model_copy(update={"dtype": "fp32"}))
    other = MODELS["mixtral"].model_copy(update={"num_experts": 4, "num_layers": 3})
    with pytest.raises(UserError, match="model with num_layers 4, num_experts 8.*one with num_l"):
        check_describes(tmp_path, other)
