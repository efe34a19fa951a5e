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


def sets(kind):
    """On a rank: [(tokens, offsets and ids of the kept tokens)] of all answers."""
    config = tiny_config(device={"kind": kind})
    engine = tiny_engine(config, *build_tiny(config), max_batch=8)
    settings = dataclasses.replace(SETTINGS, top_p=0.8, top_k=9, kept=True)
    answers = [a for g in engine.generate(random_prompts(LENGTHS), settings) for a in g.completions]
    return [[a.tokens.tolist(), a.kept.offsets.tolist(), a.kept.ids.tolist()] for a in answers]


def test_kept_tokens_of_captured_steps_are_those_of_the_cpu():
    (expected,) = run_on_ranks(1, sets, "cpu")
    (found,) = run_on_ranks(1, sets, "cuda", kind="cuda")
    assert found == expected
