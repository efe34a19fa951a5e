"""config.json with hostile or careless values: one line, at once; keys that mean nothing: taken."""

import copy
import json
import os
from pathlib import Path

import pytest

from megatron_rl.cli import check_rows
from megatron_rl.config.checks import check_config
from megatron_rl.config.hf_config import fields_of_values, read_hf_config
from megatron_rl.config.hf_export import hf_config_of
from megatron_rl.config.presets import MODEL_PRESETS
from megatron_rl.config.schema import Config, ModelConfig
from megatron_rl.errors import UserError
from megatron_rl.families import FAMILIES as ROWS
from megatron_rl.families.common.keys import spellings_of
from megatron_rl.families.common.meaningless import is_meaningless

FAMILIES = {
    "qwen3_moe": "qwen3_30b_a3b",
    "qwen2_moe": "qwen1_5_moe_a2_7b",
    "mixtral": "mixtral_8x7b",
    "olmoe": "olmoe_1b_7b",
    "deepseek_v3": "deepseek_v3",
    "qwen3": "qwen3_4b",
}


def values_of(family):
    """The content of a plain config.json of a family."""
    return hf_config_of(ModelConfig(**MODEL_PRESETS[FAMILIES[family]]))


#: What each key gets in turn; those that took longest without bounds come last.
HOSTILE = [
    *(0, -1, 1, 3, True, 0.5, -0.0, 1e-320, 1e308, float("inf"), float("nan"), "", "x", "4"),
    *([], [0], [[]], [None], ["full_attention", 3], {}, {"a": {}}, {"rope_type": 3}),
    *({"rope_theta": "x"}, {"rope_theta": 0}, {"rope_type": "yarn", "factor": []}, "a" * 100_000),
    *("\ud83d", "two\nlines", 10**40, -(10**40), 1 << 31, 10**9, 1e9),
]


@pytest.mark.parametrize("family", FAMILIES)
def test_any_value_of_any_key_is_a_model_or_one_line(family):
    plain = values_of(family)
    nested = [("rope_parameters", key) for key in plain["rope_parameters"]]
    tried = refused = 0
    for place in [*((key,) for key in plain), *nested]:
        for value in HOSTILE:
            values = copy.deepcopy(plain)
            inside = values
            for part in place[:-1]:
                inside = inside[part]
            inside[place[-1]] = value
            tried += 1
            try:
                model = ModelConfig(**fields_of_values(values))
                config = Config(model=model)
                check_config(config, None, "generate", files=False)
                check_rows(config)
            except UserError as error:
                refused += 1
                assert "\n" not in str(error) and len(str(error)) < 500, (place, value)
    assert tried >= 700 and refused > 0.6 * tried


@pytest.mark.parametrize(
    ("family", "change", "found"),
    [
        ("qwen3_moe", {"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000 (it should"),
        ("qwen3_moe", {"rope_theta": "x"}, "rope_theta is 'x' (it should be a valid number)"),
        ("deepseek_v3", {"moe_layer_freq": 0}, "moe_layer_freq is 0 (it should be greater than"),
        ("deepseek_v3", {"topk_group": 0}, "topk_group is 0 (it should be greater than or equal"),
        ("qwen3_moe", {"num_experts": True}, "num_experts is True (it should be a valid integer)"),
        ("olmoe", {"layer_types": [[]]}, "layer_types.0 is [] (it should be a valid string)"),
        ("mixtral", {"model_type": []}, "model_type [] is not supported"),
        (
            "deepseek_v3",
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "a\nb": 1}},
            "yarn's a\\nb 1 is not supported",
        ),
        (
            "deepseek_v3",
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": "4"}},
            "rope_parameters.factor is '4' (it should be a valid number)",
        ),
    ],
)
def test_a_value_of_another_type_or_size_is_named(family, change, found):
    values = {**values_of(family), **change}
    if "num_experts" in change:
        del values["num_local_experts"]
    if "rope_parameters" in change:
        del values["rope_scaling"]
    with pytest.raises(UserError) as error:
        fields_of_values(values)
    assert str(error.value).startswith(f"config.json: {found}")


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b'{"a": ' + b"[" * 100_000, "nested more than 64 deep"),
        (b'{"a": ' + b"[" * 70 + b"]" * 70 + b"}", "nested more than 64 deep"),
        (b'{"vocab_size": ' + b"9" * 5000 + b"}", "not valid JSON (an integer of 5,000 digits"),
        (b'{"a": "\xff"}', "not valid JSON (byte 8 is not UTF-8)"),
        (b" " * ((16 << 20) + 1), "(16,777,217 bytes, more than 16,777,216); expected a Hugging"),
    ],
)
def test_a_file_that_python_cannot_take_is_one_line(tmp_path, content, found):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(UserError) as error:
        read_hf_config(tmp_path)
    assert found in str(error.value) and str(error.value).count("\n") == 0


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(UserError, match="cannot read .*config.json .not a regular file.; expected"):
        read_hf_config(tmp_path / "config.json")


NEUTRAL = {
    "qwen3_moe": [
        {"qkv_bias": False},
        {"shared_expert_intermediate_size": 0},
        {"use_qk_norm": True},
        {"rope_scaling": {"rope_type": "default"}},
        {"rope_scaling": {"type": "default", "factor": 1.0}},
        {"rope_scaling": {"type": "linear", "factor": 1.0}},
        {"rope_scaling": {}},
        {"partial_rotary_factor": 1.0},
        {"_attn_implementation": "flash_attention_2"},
        {"unsloth_version": "2025.5", "unsloth_fixed": True},
        {"hidden_act": "swish"},
        {"num_mtp_layers": 0, "n_shared_experts": 0, "moe_layer_freq": 1},
        {"final_logit_softcapping": None, "quantization_config": {}},
    ],
    "mixtral": [{"norm_topk_prob": True}, {"use_qk_norm": False}, {"mlp_only_layers": []}],
    "olmoe": [{"use_qk_norm": True}, {"scoring_func": "softmax"}],
    "qwen3": [{"num_experts": 0}, {"use_qk_norm": True}],
    "deepseek_v3": [{"scoring_func": "sigmoid"}, {"qkv_bias": False}, {"qk_head_dim": 192}],
}
MEANT = {
    "qwen3_moe": [
        {"qkv_bias": True},
        {"shared_expert_intermediate_size": 8},
        {"use_qk_norm": False},
        {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_scaling": {"type": "default", "rope_type": "linear", "factor": 1.0}},
        {"partial_rotary_factor": 0.5},
        {"quantization_config": {"quant_method": "fp8"}},
        {"final_logit_softcapping": 30.0},
        {"is_encoder_decoder": True},
    ],
    "mixtral": [{"norm_topk_prob": False}, {"use_qk_norm": True}, {"mlp_only_layers": [0]}],
    "olmoe": [{"use_qk_norm": False}, {"scoring_func": "sigmoid"}],
    "qwen3": [{"num_experts": 8}],
    "deepseek_v3": [{"scoring_func": "softmax"}, {"qk_head_dim": 128}],
}


def pairs(table):
    return [(family, change) for family, changes in table.items() for change in changes]


@pytest.mark.parametrize(("family", "change"), pairs(NEUTRAL))
def test_a_value_that_means_nothing_is_taken(family, change):
    plain = values_of(family)
    if family != "deepseek_v3":
        del plain["rope_parameters"]  # a second place for what rope_scaling says
    assert fields_of_values({**plain, **change}) == fields_of_values(plain)


@pytest.mark.parametrize(("family", "change"), pairs(MEANT))
def test_a_value_that_means_something_is_refused_by_name(family, change):
    with pytest.raises(UserError) as error:
        fields_of_values({**values_of(family), **change})
    (key,) = change
    named = {"rope_scaling": "rope type"}.get(key, key)
    assert named.replace("_", " ") in str(error.value).replace("_", " ")


def test_yarn_without_an_attention_factor_of_its_own_is_taken():
    plain = values_of("deepseek_v3")
    more = {"attention_factor": None, "truncate": True, "partial_rotary_factor": 1.0}
    stretched = {**plain["rope_scaling"], **more}
    assert fields_of_values({**plain, "rope_scaling": stretched}) == fields_of_values(plain)
    with pytest.raises(UserError, match="yarn's attention_factor 1.2 is not supported"):
        fields_of_values({**plain, "rope_scaling": {**stretched, "attention_factor": 1.2}})
    with pytest.raises(
        UserError, match="rope_scaling.factor and rope_parameters.factor contradict"
    ):
        fields_of_values({**plain, "rope_scaling": {**stretched, "factor": 4.0}})


def test_a_shared_expert_of_no_width_is_none():
    """vLLM builds none either; transformers adds the output of a matrix without columns."""
    values = {**values_of("qwen2_moe"), "shared_expert_intermediate_size": 0}
    model = ModelConfig(**fields_of_values(values))
    assert model.shared_expert_ffn_hidden_size is None and not model.shared_expert_gate
    check_config(Config(model=model, data={"pack_tokens": 8192}), None, "generate", files=False)
    assert hf_config_of(model)["shared_expert_intermediate_size"] == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_every_key_that_transformers_writes_is_known(family):
    import transformers

    name = hf_config_of(ModelConfig(**MODEL_PRESETS[FAMILIES[family]]))["architectures"][0]
    written = getattr(transformers, name.replace("ForCausalLM", "Config"))().to_dict()
    (row,) = (row for row in ROWS if row.model_type == family)
    spellings = {name for several in spellings_of(row.keys).values() for name in several}
    unknown = [
        key
        for key, value in written.items()
        if key not in row.keys.model_fields
        and key not in spellings
        and is_meaningless(key, value, row.meaningless) is None
    ]
    assert len(written) > 30 and unknown == []


CASES = Path(__file__).parents[4] / "shared" / "cases" / "config_neutral_keys.json"


@pytest.mark.skipif(not CASES.is_file(), reason=f"{CASES} is not there")
def test_the_given_cases():
    cases, plain = json.loads(CASES.read_text()), values_of("qwen3_moe")
    del plain["rope_parameters"]
    for change in cases["neutral, to be taken"]:
        assert fields_of_values({**plain, **change}) == fields_of_values(plain), change
    for change in cases["still to be refused by name"]:
        with pytest.raises(UserError):
            fields_of_values({**plain, **change})
