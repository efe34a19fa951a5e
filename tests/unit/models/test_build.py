"""Where prompts may be shared."""

import importlib.util

import pytest
import torch

from megatron_rl.errors import UserError
from tests.support.tiny import cpu_device, tiny_config


@pytest.mark.parametrize(
    ("share", "device", "installed", "expected"),
    [
        ("auto", "cpu", True, True),
        ("on", "cpu", True, True),
        ("off", "cpu", False, False),
        ("auto", "cuda", False, True),
        ("auto", "cuda", True, False),
        ("on", "cuda", True, None),
    ],
)
def test_prompts_are_shared_where_the_attention_is_ours(
    share, device, installed, expected, monkeypatch
):
    cpu_device()
    from megatron_rl.models.build import shares_prompts

    found = object() if installed else None
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: found)
    config = tiny_config(data={"share_prompts": share})
    if expected is None:
        with pytest.raises(UserError, match="on with Transformer Engine's attention, which cannot"):
            shares_prompts(config, torch.device(device))
    else:
        assert shares_prompts(config, torch.device(device)) is expected
