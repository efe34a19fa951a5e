"""What a family says of itself, and each mistake of one's own: a line, before anything starts."""

import re
from pathlib import Path

import pytest

import megatron_rl
from megatron_rl.catalogue import kinds
from megatron_rl.catalogue.find import find
from megatron_rl.catalogue.listing import listed
from megatron_rl.config.checks import check_config
from megatron_rl.config.hf_config import fields_of_values
from megatron_rl.config.hf_export import hf_config_of
from megatron_rl.config.presets import MODEL_PRESETS
from megatron_rl.config.schema import Config, ModelConfig
from megatron_rl.errors import UserError
from megatron_rl.families import FAMILIES
from megatron_rl.run.continuation import own_code
from tests.support import hugging_face
from tests.support.own_family import FILE

README = Path(megatron_rl.__file__).parent / "families" / "README.md"


def test_the_readme_has_a_line_for_each():
    table = README.read_text().partition("| File |")[0]
    rows = re.findall(r"^\| (\w+) \| (.+) \|$", table, re.MULTILINE)
    listed = dict(row for row in rows if row != ("Family", "With"))
    assert listed == {family.model_type: family.summary for family in FAMILIES}


def test_each_is_in_a_file_of_its_name_without_mistake_and_tried_under_layouts():
    variants = {name.partition(",")[0] for name in hugging_face.VARIANTS}
    assert {family.model_type for family in FAMILIES} == variants
    for family, row in zip(FAMILIES, kinds.FAMILIES.rows, strict=True):
        assert family.mistake() is None and row.load() is family
        assert row.name == row.code.split(".")[-1].split(":")[0] == family.model_type


def test_they_are_listed():
    lines = listed(kinds.FAMILIES, ["mixtral", f"{FILE}:FAMILY"])
    assert lines[2:6] == [
        "mixtral",
        "    every layer of experts",
        "    arXiv 2401.04088",
        "    model_type mixtral, MixtralForCausalLM of transformers",
    ]
    assert lines[7:] == [
        f"{FILE}:FAMILY",
        "    Qwen3-MoE with other names",
        "    model_type my_moe, MyMoeForCausalLM of transformers",
    ]


MINE = """
from dataclasses import replace
from typing import Any
from megatron_rl.extend import Rule
from megatron_rl.families import mixtral, qwen3_moe
from megatron_rl.families.common.keys import MoeKeys

BASE = replace(qwen3_moe.FAMILY, model_type="mine")

def rules(**changes):
    return {**qwen3_moe.FAMILY.layer_weights, **{"mlp.router.weight": Rule(**changes)}}

def reads(**more):
    return replace(BASE, read=lambda file, keys: {**qwen3_moe.read(file, keys), **more})

def fails(file, keys):
    return {"num_experts": keys.num_memories}

def refuses(file, keys):
    raise file.refuse("a recurrent layer has no counterpart in Megatron-Core here")

a_string = "qwen3_moe"
a_class = MoeKeys
numbered = replace(BASE, model_type=3)
keyless = replace(BASE, keys={"a": int})
unplaced = replace(BASE, layer_name="model.layers.")
few_ends = replace(BASE, weights={})
no_mapping = replace(BASE, layer_weights=[1])
no_reader = replace(BASE, read=lambda file: {})
no_writer = replace(BASE, write=None)
no_rule = replace(BASE, layer_weights={"mlp.router.weight": ("a",)})
joined = replace(BASE, layer_weights=rules(join="stack", parts=("a",)))
parted = replace(BASE, layer_weights=rules(join="qkv", parts=("a", "b")))
texts = replace(BASE, layer_weights=rules(join="copy", parts="ab"))
placed = replace(BASE, layer_weights=rules(join="copy", parts=("{expert}.a",)))
open_brace = replace(BASE, layer_weights=rules(join="copy", parts=("{a",)))
stored = replace(BASE, layer_weights=rules(join="copy", parts=("a",), stored_as=("{n}",)))
mamba = reads(mamba_state=3)
near = reads(num_expert=3)
typed = reads(num_experts="eight")
bounded = reads(moe_top_k=0)
failing = replace(BASE, read=fails)
refusing = replace(BASE, read=refuses)
no_norms = replace(BASE, layer_weights=mixtral.FAMILY.layer_weights)
silent = replace(BASE, write=lambda model: {"num_experts": model["num_memories"]})
other = replace(BASE, write=lambda model: {**qwen3_moe.write(model), "norm_topk_prob": False})
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(MINE)
    return tmp_path


def refusal(action, *arguments):
    with pytest.raises(UserError) as error:
        action(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("a_string", ", which is of type str; expected a Hugging Face family: Family(...), from"),
        ("a_class", ", which is of type ModelMetaclass; expected a Hugging Face family"),
        ("numbered", ": its model_type is 3; expected a string"),
        ("keyless", ": its keys is {'a': <class 'int'>}; expected a class that derives from Keys"),
        ("unplaced", ": its layer_name is 'model.layers.'; expected one with {layer} in it"),
        ("few_ends", ": its weights are none; expected embedding.word_embeddings.weight, d"),
        ("no_mapping", ": its layer_weights is [1]; expected a mapping"),
        ("no_reader", ": its read has to be a function (file, keys); correct it"),
        ("no_writer", ": its write has to be a function (model); correct it"),
        ("no_rule", ": its rule of mlp.router.weight is ('a',); expected a Rule"),
        (
            "joined",
            ": its rule of mlp.router.weight has the join 'stack'; expected one of copy, ga",
        ),
        ("parted", ": its rule of mlp.router.weight has 2 parts; expected 3 with the join qkv"),
        ("texts", " has parts 'ab'; expected a tuple of names, such as ('one', 'two')"),
        ("placed", " has parts ('{expert}.a',); expected {expert} in none"),
        ("open_brace", " has parts ('{a',); expected {expert} in none"),
        ("stored", " has stored_as ('{n}',); expected no {} in them"),
    ],
)
def test_a_family_that_is_none_is_one_line(folder, name, words):
    message = refusal(find, kinds.FAMILIES, f"./mine.py:{name}")
    assert message.startswith("model.family is './mine.py:") and words in message


VALUES = hf_config_of(ModelConfig(**MODEL_PRESETS["tiny_moe"])) | {"model_type": "mine"}


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (
            "mamba",
            "model.family ./mine.py:mamba reads 'mamba_state', which models here do not have",
        ),
        ("near", "reads 'num_expert', which models here do not have (did you mean num_experts?)"),
        ("typed", "reads model.num_experts as 'eight' (Input should be a valid integer"),
        ("bounded", "reads model.moe_top_k as 0 (Input should be greater than or equal to 1)"),
        ("failing", "reading config.json raised AttributeError 'Qwen3MoeKeys' object has no attr"),
        (
            "refusing",
            "config.json: a recurrent layer has no counterpart in Megatron-Core here; exp",
        ),
    ],
)
def test_what_megatron_core_does_not_have_is_one_line(folder, name, words):
    assert words in refusal(fields_of_values, VALUES, f"./mine.py:{name}")


def test_a_failing_reader_is_named_with_its_line(folder):
    number = MINE[: MINE.index("keys.num_memories")].count("\n") + 1
    message = refusal(fields_of_values, VALUES, "./mine.py:failing")
    assert f"mine.py:{number}); correct the family" in message


def model_of(name):
    return ModelConfig(**MODEL_PRESETS["tiny_moe"], family=f"./mine.py:{name}")


def test_a_weight_without_a_rule_is_found_before_ranks_join(folder):
    config = Config(model=model_of("no_norms"))
    message = refusal(check_config, config, None, "generate")
    weight = "self_attention.q_layernorm.weight"
    assert message.startswith(
        f"model.family ./mine.py:no_norms has no rule for the weight {weight}"
    )


def test_a_writer_is_held_to_what_it_reads(folder):
    assert hf_config_of(model_of("BASE"))["model_type"] == "mine"
    message = refusal(hf_config_of, model_of("silent"))
    assert "writing config.json raised KeyError 'num_memories'" in message
    message = refusal(hf_config_of, model_of("other"))
    assert "the nearest, ./mine.py:other, has no model.router_pre_softmax False" in message


def test_its_file_is_kept_with_checkpoints(folder):
    import hashlib

    digest = hashlib.sha256(MINE.encode()).hexdigest()
    assert own_code(Config(model=model_of("BASE")), "sft") == {"./mine.py:BASE": digest}
    assert own_code(Config(), "sft") == {}
