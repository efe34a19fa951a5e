"""The lists the config keeps so that it need not import torch agree with what they stand for."""

from megatron_rl.algorithms import ADVANTAGES, LOSSES
from megatron_rl.config.names import ADVANTAGE_NAMES, LOSS_NAMES, VERIFIER_NAMES
from megatron_rl.config.nearest import nearest
from megatron_rl.config.presets import MODEL_PRESETS
from megatron_rl.config.schema import Config, ModelConfig
from megatron_rl.rewards import VERIFIERS


def test_names_agree_with_the_dicts():
    assert set(LOSS_NAMES) == set(LOSSES)
    assert set(ADVANTAGE_NAMES) == set(ADVANTAGES)
    assert set(VERIFIER_NAMES) == set(VERIFIERS)


def test_default_names_exist():
    config = Config()
    assert config.algorithm.name in LOSSES
    assert config.algorithm.advantages in ADVANTAGES
    assert config.reward.name in VERIFIERS


def test_presets_set_the_whole_architecture():
    """A preset leaves no size to the defaults, which are those of another model."""
    sizes = {
        *("num_layers", "hidden_size", "num_attention_heads", "num_query_groups", "head_dim"),
        *("ffn_hidden_size", "num_experts", "moe_top_k", "moe_ffn_hidden_size", "vocab_size"),
        "max_sequence_length",
    }
    of_experts = {"moe_top_k", "moe_ffn_hidden_size"}
    for name, fields in MODEL_PRESETS.items():
        needed = sizes if fields.get("num_experts") else sizes - of_experts
        assert needed - set(fields) == set(), name
        assert set(fields) - set(ModelConfig.model_fields) == set(), name


def test_nearest_looks_at_whole_names_and_last_parts():
    names = ["model.hidden_size", "rollout.temperature", "rollout.top_k", "train.steps"]
    assert nearest("model.hiden_size", names) == "model.hidden_size"
    assert nearest("temperature", names) == "rollout.temperature"
    assert nearest("model.temperature", names) == "rollout.temperature"
    assert nearest("zzzz", names) is None
    assert nearest("anything", []) is None
