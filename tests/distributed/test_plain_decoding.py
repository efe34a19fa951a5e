"""The plain functions on several ranks: what Megatron's modules give, with the weights of now."""

import numpy as np
import pytest

from megatron_rl.rollout.engine import SamplingSettings
from tests.support.layout_cases import DEEPSEEK, GATED, LATENT, OVER_HEADS
from tests.support.ranks import run_on_ranks
from tests.support.tiny import build_tiny, random_prompts, tiny_config, tiny_engine

LENGTHS = [5, 1, 12, 7, 3]
SETTINGS = SamplingSettings(samples=3, max_new_tokens=10, seed=4)
BOTH = {**LATENT, **DEEPSEEK, "num_experts": 8}
ODD = {**OVER_HEADS, "vocab_size": 65, "qkv_bias": True}


def compared(parallel, model):
    """On a rank: (whether experts were gathered, answers before, and after the weights changed: by
    the plain functions and through modules).
    """
    import torch
    import torch.distributed as dist

    config = tiny_config(parallel=parallel, model={"num_layers": 4, **model})
    built = build_tiny(config)
    from megatron_rl.rollout.builtin.plain.plan import Plan

    engine = tiny_engine(config, *built, max_batch=8)
    modules = tiny_engine(config, *built, max_batch=8, plan=Plan("the test compares"))
    assert engine.plan.is_plain, engine.plan
    own = random_prompts(LENGTHS)
    if parallel == {"expert": 2}:  # each rank has prompts of its own
        own = own[dist.get_rank() :: 2]

    def answers(one):
        groups = one.generate(own, SETTINGS)
        return [(a.tokens.tolist(), a.logprobs) for group in groups for a in group.completions]

    before = answers(engine)
    with torch.no_grad():
        for chunk in built[2]:
            for parameter in chunk.parameters():
                parameter.mul_(1.1)  # where it lies
                parameter.data = parameter.data.clone()  # and elsewhere
    return engine.plan.gathers, before, answers(engine), answers(modules)


@pytest.mark.parametrize(
    ("parallel", "model", "gathers"),
    [
        ({"tensor": 2}, BOTH, False),
        ({"tensor": 2}, ODD, False),
        ({"tensor": 2, "expert": 2}, GATED, False),
        ({"tensor": 2, "expert_tensor": 2}, GATED, False),
        ({"expert": 2}, BOTH, True),
        ({"expert_tensor": 2}, GATED, True),
        ({"pipeline": 2, "virtual_pipeline": 2}, BOTH, False),
        ({"pipeline": 2}, {"tie_embeddings": True}, False),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else str(value),
)
def test_as_through_modules_before_and_after_the_weights_change(parallel, model, gathers):
    for gathered, before, plain, modules in run_on_ranks(2, compared, parallel, model):
        assert gathered == gathers
        assert [tokens for tokens, _ in plain] == [tokens for tokens, _ in modules]
        assert [tokens for tokens, _ in plain] != [tokens for tokens, _ in before]
        for (_, logprobs), (_, expected) in zip(plain, modules):
            np.testing.assert_allclose(logprobs, expected, atol=1e-5)


def little_memory(spare_of_rank):
    """On a rank: what the engine does where this is what the ranks can spare."""
    from unittest import mock

    import torch.distributed as dist

    config = tiny_config(parallel={"expert": 2})
    built = build_tiny(config)
    from megatron_rl.rollout.builtin import generate

    spare = spare_of_rank[dist.get_rank()]
    with mock.patch.object(generate, "spare_bytes", lambda: spare):
        engine = tiny_engine(config, *built)
    groups = engine.generate(random_prompts([4, 6]), SETTINGS)
    tokens = [answer.tokens.tolist() for group in groups for answer in group.completions]
    return engine.plan.text(), tokens


def test_experts_are_gathered_where_they_fit_on_every_rank():
    # 4 experts of 3 matrices of 32 x 32 in fp32, in 2 layers: 98,304 bytes
    fits = run_on_ranks(2, little_memory, [98_304, 98_304])
    not_all = run_on_ranks(2, little_memory, [98_304, 98_303])
    assert {text for text, _ in fits} == {"by each rank alone, with copies of all experts"}
    assert {text for text, _ in not_all} == {
        "through Megatron's modules: all experts do not fit a rank's memory"
    }
    assert fits[0][1] == not_all[0][1] and len(fits[0][1]) == 6
