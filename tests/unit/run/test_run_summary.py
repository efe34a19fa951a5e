"""What a run says of itself before it starts."""

import pytest

from tests.support.tiny import cpu_device


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
