"""The defaults of the schema, and its presets."""

from megatron_rl.catalogue import kinds
from megatron_rl.config.presets import MODEL_PRESETS
from megatron_rl.config.schema import Config, ModelConfig


def test_default_names_exist():
    config = Config()
    assert config.algorithm.name in kinds.LOSSES.names
    assert config.algorithm.advantages in kinds.ADVANTAGES.names
    assert config.reward.name in kinds.VERIFIERS.names


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
