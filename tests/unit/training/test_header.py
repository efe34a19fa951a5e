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
    ],
)
def test_servers(rollout, text):
    cpu_device()
    from megatron_rl.config.schema import RolloutConfig
    from megatron_rl.training.header import _servers

    assert _servers(RolloutConfig(engine="vllm", **rollout)) == text
