"""Rules of the families: names, and joins against tensors put together by hand."""

import re

import pytest
import torch

from megatron_rl.config.hf_config import fields_of_values
from megatron_rl.config.schema import ModelConfig
from megatron_rl.config.weight_names import layer_weights
from megatron_rl.errors import UserError
from megatron_rl.families import FAMILIES as ROWS
from megatron_rl.families.common.family import Rule
from megatron_rl.weights.rules import join, rule_of, split
from tests.support import hugging_face
from tests.support.tiny import build_tiny, tiny_config

FAMILIES = {row.model_type: row for row in ROWS}

#: Two query groups of two heads each, one channel a head.
MODEL = ModelConfig(
    num_attention_heads=4, num_query_groups=2, head_dim=2, hidden_size=1, num_layers=1
)
QUERIES = torch.arange(8.0)[:, None]  # four heads of two channels
KEYS = torch.arange(10.0, 14.0)[:, None]
VALUES = torch.arange(20.0, 24.0)[:, None]
#: For each group: its two query heads, its key head, its value head.
GROUPED = [0, 1, 2, 3, 10, 11, 20, 21, 4, 5, 6, 7, 12, 13, 22, 23]


def test_names_of_a_layer_and_of_an_expert():
    rule = rule_of("decoder.layers.7.mlp.experts.12.linear_fc1.weight", FAMILIES["qwen3_moe"])
    block = "model.layers.7.mlp.experts.12"
    assert rule == Rule("gate_up", (f"{block}.gate_proj.weight", f"{block}.up_proj.weight"))
    rule = rule_of("decoder.layers.0.mlp.experts.3.linear_fc2.weight", FAMILIES["mixtral"])
    assert rule.parts == ("model.layers.0.block_sparse_moe.experts.3.w2.weight",)
    rule = rule_of("decoder.layers.10.self_attention.linear_qkv.bias", FAMILIES["qwen2_moe"])
    parts = tuple(f"model.layers.10.self_attn.{x}_proj.bias" for x in "qkv")
    assert rule == Rule("qkv", parts)
    assert rule_of("output_layer.weight", FAMILIES["olmoe"]).parts == ("lm_head.weight",)


@pytest.mark.parametrize(
    "family, name",
    [
        ("mixtral", "decoder.layers.0.self_attention.q_layernorm.weight"),
        ("olmoe", "decoder.layers.0.mlp.linear_fc1.weight"),
        ("qwen3_moe", "decoder.layers.0.mlp.shared_experts.linear_fc1.weight"),
        ("qwen3_moe", "decoder.layers.0.mlp.router.expert_bias"),
        ("qwen3_moe", "something.else"),
    ],
)
def test_a_weight_the_family_does_not_have_is_refused(family, name):
    with pytest.raises(UserError, match=f"{name} has no counterpart in Hugging Face's {family}"):
        rule_of(name, FAMILIES[family])


def test_queries_keys_and_values_are_grouped():
    rule = Rule("qkv", ("q", "k", "v"))
    joined = join(rule, [QUERIES, KEYS, VALUES], MODEL)
    assert joined[:, 0].tolist() == GROUPED
    slices = [join(rule, [QUERIES, KEYS, VALUES], MODEL, 0, rank, 2) for rank in range(2)]
    assert [part[:, 0].tolist() for part in slices] == [GROUPED[:8], GROUPED[8:]]
    parts = split(rule, joined, MODEL)
    assert all(map(torch.equal, parts, [QUERIES, KEYS, VALUES]))
    bias = join(rule, [QUERIES[:, 0], KEYS[:, 0], VALUES[:, 0]], MODEL)
    assert bias.tolist() == GROUPED


def test_gate_and_up_are_each_split():
    gate, up = torch.arange(4.0)[:, None], torch.arange(10.0, 14.0)[:, None]
    rule = Rule("gate_up", ("g", "u"))
    assert join(rule, [gate, up], MODEL)[:, 0].tolist() == [0, 1, 2, 3, 10, 11, 12, 13]
    second = join(rule, [gate, up], MODEL, 0, 1, 2)
    assert second[:, 0].tolist() == [2, 3, 12, 13]
    assert all(map(torch.equal, split(rule, torch.cat([gate, up]), MODEL), [gate, up]))


def test_a_copy_is_split_along_its_axis():
    weight = torch.arange(6.0).view(2, 3 * 1)
    rule = Rule("copy", ("w",))
    assert join(rule, [weight], MODEL, 0, 1, 2).tolist() == [[3.0, 4.0, 5.0]]
    assert join(rule, [weight.T], MODEL, 1, 0, 2).tolist() == [[0.0], [1.0], [2.0]]


@pytest.mark.parametrize("variant", hugging_face.VARIANTS)
def test_the_names_of_weights_are_those_of_the_model_that_is_built(variant):
    import transformers

    family, options = hugging_face.VARIANTS[variant]
    values = getattr(transformers, f"{family}Config")(**options).to_dict()
    config = tiny_config(model={"init_std": 0.02, **fields_of_values(values)})
    groups, _, chunks = build_tiny(config)
    from megatron_rl.models.parameters import weight_views

    found = {view.name for view in weight_views(chunks, groups)}
    within = {
        re.sub(r"\.experts\.\d+\.", ".experts.{expert}.", name.split(".", 3)[3])
        for name in found
        if name.startswith("decoder.layers.")
    }
    named = layer_weights(config.model)
    assert within == set(named) and len(named) == len(set(named))


def test_every_part_of_a_family_is_named_once():
    for family, row in FAMILIES.items():
        rules = [*row.weights.values(), *row.layer_weights.values()]
        parts = [part for rule in rules for part in rule.parts]
        assert len(parts) == len(set(parts)), family
