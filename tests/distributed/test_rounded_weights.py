"""A sampler with rounded weights on several ranks: each rounds what it holds."""

import numpy as np
import pytest

from megatron_rl.rollout.engine import SamplingSettings
from tests.support.layout_cases import GATED
from tests.support.ranks import run_on_ranks
from tests.support.tiny import build_tiny, random_prompts, tiny_config, tiny_engine


def sampled(parallel, how):
    """On a rank: (answers by the plain functions with rounding, by modules that hold the rounded
    weights, the largest change of a parameter by the sampling).
    """
    import torch
    import torch.distributed as dist

    from megatron_rl.rollout.builtin.plain.plan import Plan
    from tests.support.rounded import round_in_place

    config = tiny_config(parallel=parallel, model={**GATED, "num_layers": 2})
    built = build_tiny(config)
    engine = tiny_engine(config, *built, rounding=how)
    assert engine.plan.is_plain, engine.plan
    own = random_prompts([5, 1, 9])
    if parallel == {"expert": 2}:  # each rank has prompts of its own
        own = own[dist.get_rank() :: 2]
    settings = SamplingSettings(samples=2, max_new_tokens=6, seed=4)

    def answers(one):
        groups = one.generate(own, settings)
        return [(a.tokens.tolist(), a.logprobs) for group in groups for a in group.completions]

    before = [p.detach().clone() for chunk in built[2] for p in chunk.parameters()]
    plain = answers(engine)
    after = [p for chunk in built[2] for p in chunk.parameters()]
    same = all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    for chunk in built[2]:
        round_in_place(chunk, how)
    return plain, answers(tiny_engine(config, *built, plan=Plan("the test compares"))), same


@pytest.mark.parametrize("parallel", [{"tensor": 2}, {"expert": 2}, {"pipeline": 2}], ids=str)
def test_as_modules_with_rounded_weights(parallel):
    for plain, modules, same in run_on_ranks(2, sampled, parallel, "fp8"):
        assert same and len(plain) > 0
        assert [tokens for tokens, _ in plain] == [tokens for tokens, _ in modules]
        for (_, logprobs), (_, expected) in zip(plain, modules):
            np.testing.assert_allclose(logprobs, expected, atol=1e-5)
