"""What a run says of itself before it starts."""

from types import SimpleNamespace

import pytest

from tests.support.tiny import build_tiny, cpu_device, tiny_config, tiny_engine


@pytest.mark.parametrize(
    ("rollout", "text"),
    [
        (
            {"servers": {"urls": ["http://one:1", "http://two:2"]}},
            "vllm servers: http://one:1, http://two:2",
        ),
        (
            {"servers": {"start": 2, "python": "venv/bin/python"}, "lag": 1},
            "vllm servers: 2 started with venv/bin/python, answers one step ahead",
        ),
        (
            {"servers": {"start": 1, "python": "py", "options": ["--trust-remote-code"]}},
            "vllm servers: 1 started with py, which execute code of the model's directory "
            "(--trust-remote-code)",
        ),
    ],
)
def test_engine(rollout, text):
    cpu_device()
    from megatron_rl.config.schema import RolloutConfig
    from megatron_rl.run.run_summary import _engine

    assert _engine(RolloutConfig(engine="vllm", **rollout)) == text


@pytest.mark.parametrize(
    ("optimizer", "text"),
    [
        ({"lr": 1e-6}, "adam, learning rate 1e-06"),
        (
            {"name": "muon", "settings": {"momentum": 0.9}, "lr": 0.1},
            "muon, momentum 0.9, learning rate 0.1",
        ),
        (
            {"lr": 2e-4, "schedule": "cosine", "min_lr": 1e-5, "warmup_steps": 20},
            "adam, learning rate 0.0002, 20 optimizer steps of warm-up, cosine decay to 1e-05",
        ),
    ],
)
def test_the_learning_rate_is_said(optimizer, text):
    cpu_device()
    from megatron_rl.config.schema import Config
    from megatron_rl.run.run_summary import _optimizer

    assert _optimizer(Config(optimizer=optimizer).optimizer) == text


def test_decoding_is_as_the_engine_holds_it():
    """Also within a conversation, and also for what only the modules of the model tell."""
    cpu_device()
    from megatron_rl.rollout.builtin.plain.plan import Plan
    from megatron_rl.rollout.conversation import ConversationEngine
    from megatron_rl.run.run_summary import decoding_facts

    config = tiny_config()
    built = build_tiny(config)
    own = {"decoding": "by each rank alone, with copies of all experts"}
    engine = tiny_engine(config, *built, plan=Plan(None, gathers=True))
    talks = ConversationEngine(engine, str, "tool", list, 2, 64, built[0], 1)
    assert decoding_facts(engine) == own and decoding_facts(talks) == own
    assert decoding_facts(tiny_engine(config, *built)) == {}
    built[2][0].decoder.layers[0].mlp.register_forward_hook(lambda *_: None)
    assert decoding_facts(tiny_engine(config, *built)) == {
        "decoding": "through Megatron's modules: a hook watches decoder.layers.0.mlp"
    }
    assert decoding_facts(object()) == {}  # of servers, or a user's own


def test_what_travels_is_as_the_policy_holds_it():
    cpu_device()
    from megatron_rl.policy.expert_exchange import ExchangePlan, ExpertExchange
    from megatron_rl.run.run_summary import exchange_facts

    groups, _, chunks = build_tiny(tiny_config())
    for rows, facts in (
        ((0, 0), {"experts": "weights travel between ranks, tokens stay"}),
        ((), {}),
    ):
        exchange = ExpertExchange(ExchangePlan(*rows), chunks, [], groups)
        assert exchange_facts(SimpleNamespace(exchange=exchange)) == facts
