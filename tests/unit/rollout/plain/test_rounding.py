"""A sampler with rounded weights: the values, and mu of a model that has them."""

import numpy as np
import pytest
import torch

from megatron_rl.errors import UserError
from megatron_rl.rollout.engine import SamplingSettings
from tests.support.layout_cases import DEEPSEEK, GATED, LATENT
from tests.support.rounded import round_in_place
from tests.support.tiny import build_tiny, random_prompts, tiny_config, tiny_engine

SETTINGS = SamplingSettings(samples=3, max_new_tokens=8, temperature=1.3, seed=2)


def e4m3():
    """All 127 non-negative finite values, by the format's definition: 4 bits of exponent with bias
    7, 3 of mantissa.
    """
    subnormal = [m / 8 * 2.0**-6 for m in range(8)]
    normal = [(1 + m / 8) * 2.0 ** (e - 7) for e in range(1, 16) for m in range(8)]
    return np.array([*subnormal, *normal[:-1]])  # the last is NaN


def test_fp8_is_the_nearest_value_at_the_scale_of_the_output():
    from megatron_rl.rollout.builtin.plain.rounding import to_fp8

    generator = torch.Generator().manual_seed(3)
    weights = torch.randn(4, 5, 40, generator=generator) * 10.0 ** torch.arange(-3, 2)[:, None]
    weights[0, 0] = 0.0
    found = to_fp8(weights).double().numpy()
    table = e4m3()
    assert (len(table), table.max()) == (127, 448.0)
    for row, result in zip(weights.double().numpy().reshape(20, 40), found.reshape(20, 40)):
        scale = abs(row).max() / 448
        if scale == 0:
            assert not result.any()
            continue
        distances = abs(abs(row / scale)[:, None] - table)
        nearest = np.sign(row) * table[distances.argmin(1)] * scale
        np.testing.assert_allclose(result, nearest, rtol=1e-6)
        assert abs(result - row).max() > 0  # something was rounded


def test_bf16_has_eight_bits():
    from megatron_rl.rollout.builtin.plain.rounding import to_bf16

    weights = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-7, 3e-39])
    assert to_bf16(weights).tolist() == [1.0, 1 + 2**-6, -1 - 2**-7, pytest.approx(3e-39, rel=0.02)]


def scores(chunk, prompt, tokens):
    """log mu of an answer's tokens, by one causal pass."""
    from megatron_rl.models.attention import packed_placement
    from megatron_rl.models.forward import forward_row

    row = torch.tensor(np.concatenate([prompt, tokens]))
    with torch.no_grad():
        logits = forward_row(chunk, row, packed_placement([len(row)], len(row), row.device))
    logprobs = (logits.squeeze(0) / 1.3).log_softmax(-1)[:-1].gather(1, row[1:, None])
    return logprobs.squeeze(1)[len(prompt) - 1 :].numpy()


def tensors(chunk):
    return [*chunk.parameters(), *chunk.buffers()]


@pytest.mark.parametrize("how", ["bf16", "fp8"])
@pytest.mark.parametrize(
    "model",
    [
        {"tie_embeddings": True, "qkv_bias": True},
        {**GATED, "moe_layer_freq": [0, 1]},
        {**LATENT, **DEEPSEEK, "num_experts": 8},
    ],
    ids=["grouped, tied", "gated", "latent"],
)
def test_mu_is_of_a_model_with_rounded_weights(how, model):
    config = tiny_config(model=model)
    groups, megatron_config, chunks = build_tiny(config)
    before = [tensor.clone() for tensor in tensors(chunks[0])]
    engine = tiny_engine(config, groups, megatron_config, chunks, rounding=how)
    answers = [
        (group.prompt.tokens, answer)
        for group in engine.generate(random_prompts([5, 1, 9]), SETTINGS)
        for answer in group.completions
    ]
    assert all(map(torch.equal, before, tensors(chunks[0])))
    trainer = [scores(chunks[0], prompt, answer.tokens) for prompt, answer in answers]
    round_in_place(chunks[0], how)
    for prompt, answer in answers:
        expected = scores(chunks[0], prompt, answer.tokens)
        np.testing.assert_allclose(answer.logprobs, expected, atol=1e-5)
    mismatch = [abs(one.logprobs - theirs).max() for (_, one), theirs in zip(answers, trainer)]
    assert max(mismatch) > 1e-4


def test_modules_are_refused():
    from megatron_rl.rollout.builtin.plain.plan import Plan

    config = tiny_config()
    plan = Plan("the test asks")
    with pytest.raises(UserError, match="round_weights is fp8, and .* through Megatron's"):
        tiny_engine(config, *build_tiny(config), rounding="fp8", plan=plan)
