"""Which models are the same architecture, and what the user is told when they are not."""

import pytest

from megatron_rl.checkpoint.identity import architecture_of, check_architecture, layout_of
from megatron_rl.config.schema import ModelConfig, ParallelConfig
from megatron_rl.errors import UserError


@pytest.mark.parametrize(
    "other",
    [
        {"num_query_groups": 4},
        {"head_dim": 32},
        {"moe_layer_freq": [1, 1, 1, 1]},
        {"freeze_router": True, "aux_loss_coeff": 0.1, "init_std": 0.5, "max_sequence_length": 9},
    ],
)
def test_defaults_spelled_out_and_settings_of_training_are_the_same_architecture(other):
    assert architecture_of(ModelConfig(**other)) == architecture_of(ModelConfig())


def test_layer_pattern_counts_from_layer_zero():
    assert architecture_of(ModelConfig(moe_layer_freq=3))["moe_layer_freq"] == [1, 0, 0, 1]


@pytest.mark.parametrize(
    "field, value, shown",
    [
        ("hidden_size", 256, "256"),
        ("rope_base", 1e6, "1000000.0"),
        ("router_score", "sigmoid", "sigmoid"),
        ("moe_layer_freq", 2, r"\[1, 0, 1, 0\]"),
        ("dtype", "bf16", "bf16"),
    ],
)
def test_a_differing_field_is_named_with_both_values(field, value, shown):
    stored = architecture_of(ModelConfig())
    wanted = architecture_of(ModelConfig(head_dim=32, **{field: value}))
    stored_text = str(stored[field]).replace("[", r"\[").replace("]", r"\]")
    with pytest.raises(UserError) as error:
        check_architecture(stored, wanted, "somewhere/step_4")
    message = str(error.value)
    assert "\n" not in message
    error.match(rf"somewhere/step_4 .* with {field} {stored_text}; .* has {field} {shown}; use ")


def test_all_differing_fields_are_named_and_no_other():
    wanted = architecture_of(ModelConfig(num_experts=16, vocab_size=200))
    with pytest.raises(UserError, match="with num_experts 8, vocab_size 128; .*16, vocab_size 200"):
        check_architecture(architecture_of(ModelConfig()), wanted, "here")


def test_a_field_on_one_side_only_is_named():
    with pytest.raises(UserError, match="with old 1, new not set; .* has old not set, new 2"):
        check_architecture({"old": 1}, {"new": 2}, "here")


def test_ignored_fields_may_differ():
    check_architecture(
        {"dtype": "fp32", "a": [1]}, {"dtype": "bf16", "a": (1,)}, "here", ("dtype",)
    )


def test_layout_has_every_size_and_the_kind_of_optimizer():
    parallel = ParallelConfig(tensor=2, expert=4, distributed_optimizer=True, recompute="full")
    assert layout_of(parallel, 8) == {
        "world_size": 8,
        "tensor": 2,
        "pipeline": 1,
        "virtual_pipeline": None,
        "context": 1,
        "expert": 4,
        "expert_tensor": 1,
        "distributed_optimizer": True,
    }
