"""FLOP of a step, worked out by hand."""

import pytest

from megatron_rl.config.schema import Config
from megatron_rl.config.work import forward_flop, step_flop

MODEL = {
    "num_layers": 2,
    "hidden_size": 10,
    "num_attention_heads": 2,
    "num_query_groups": 1,
    "head_dim": 4,
    "num_experts": 4,
    "moe_top_k": 2,
    "moe_ffn_hidden_size": 3,
    "ffn_hidden_size": 5,
    "vocab_size": 7,
    "qk_norm": False,
}


def test_of_a_token():
    """A layer: 240 of q, k, v and o; 20 of norms; 40 of the router; 2 experts of 90. Head 70, its
    norm 10.
    """
    model = Config(model=MODEL).model
    parameters = 2 * (240 + 20 + 40 + 180) + 70 + 10
    attention = 2 * 2 * (4 + 4) * 30  # layers, heads, 2 (d + v) for each of 30 / 2 keys
    assert forward_flop(model, 30) == 2 * parameters + attention


def test_a_tied_head_is_multiplied_and_its_rows_are_looked_up():
    untied, tied = (Config(model={**MODEL, "tie_embeddings": x}).model for x in (False, True))
    assert forward_flop(untied, 5) == forward_flop(tied, 5)


def test_of_the_stages():
    """24 tokens of 8 sequences."""
    config = Config(
        model=MODEL,
        rollout={"prompts_per_step": 4, "samples_per_prompt": 2},
        algorithm={"epochs": 2, "mini_batches": 2},
        train={"batch_size": 6},
    )
    of_token = forward_flop(config.model, 3)
    found = step_flop(config, 24, supervised=False)
    assert found == {"rollout": 24 * of_token, "update": 144 * of_token}
    of_token = forward_flop(config.model, 4)
    assert step_flop(config, 24, supervised=True) == {"update": pytest.approx(72 * of_token)}


def test_the_rollout_of_servers_is_theirs():
    rollout = {"engine": "vllm", "servers": {"urls": ["http://one:1"]}}
    assert "rollout" not in step_flop(Config(model=MODEL, rollout=rollout), 10, supervised=False)
