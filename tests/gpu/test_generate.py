"""The built-in engine on CUDA gives, token for token, what it gives on the CPU."""

import dataclasses

import numpy as np
import pytest

from megatron_rl.rollout.engine import SamplingSettings
from tests.support.layout_cases import GATED, LATENT, OVER_HEADS
from tests.support.ranks import run_on_ranks
from tests.support.tiny import build_tiny, random_prompts, tiny_config, tiny_engine, uneven_norms

pytestmark = pytest.mark.gpu

LENGTHS = [5, 1, 12, 7, 3, 9]
SETTINGS = SamplingSettings(samples=3, max_new_tokens=12, temperature=0.9, top_p=0.95, seed=4)


def generate(kind, model, settings):
    """On a rank: [(tokens, log-probs)] of all answers."""
    config = tiny_config(model=model, device={"kind": kind})
    built = build_tiny(config)
    uneven_norms(built[2][0])
    engine = tiny_engine(config, *built, max_batch=8)
    groups = engine.generate(random_prompts(LENGTHS), settings)
    return [(answer.tokens, answer.logprobs) for group in groups for answer in group.completions]


@pytest.mark.parametrize("greedy", [False, True], ids=["sampled", "greedy"])
@pytest.mark.parametrize(
    "model, with_te",
    [
        ({}, False),
        ({}, True),
        (GATED, True),
        (OVER_HEADS, True),
        ({**LATENT, "moe_layer_freq": [0, 1]}, True),
    ],
    ids=["local", "te", "gated-te", "over-heads-te", "latent-te"],
)
def test_answers_are_those_of_the_cpu(model, with_te, greedy):
    settings = dataclasses.replace(SETTINGS, greedy=greedy)
    settings = dataclasses.replace(settings, samples=1) if greedy else settings
    (expected,) = run_on_ranks(1, generate, "cpu", model, settings)
    on_cuda = {**model, "transformer_engine": with_te}
    (found,) = run_on_ranks(1, generate, "cuda", on_cuda, settings, kind="cuda")
    assert len({tuple(tokens.tolist()) for tokens, _ in expected}) > 1
    assert [t.tolist() for t, _ in found] == [t.tolist() for t, _ in expected]
    for (_, logprobs), (_, reference) in zip(found, expected):
        np.testing.assert_allclose(logprobs, reference, atol=1e-4)
