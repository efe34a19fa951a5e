"""The output layer of a model: in tiles, as logits, tied, in fp32."""

import pytest
import torch

from megatron_rl.rollout.engine import SamplingSettings
from tests.support.tiny import build_tiny, random_prompts, tiny_config, tiny_engine

TEMPERATURE = 0.8
TOKENS = torch.arange(48) * 5 % 61
WEIGHTS = torch.linspace(-1.0, 1.5, 48)


def gradients(chunk, in_tiles):
    """Of a weighted sum of log-probabilities and entropies, by name."""
    from megatron_rl.models.attention import packed_placement
    from megatron_rl.models.forward import forward_row
    from megatron_rl.models.gpt.chunk import head_of
    from megatron_rl.parallel.vocab_head import head_values

    placement = packed_placement([20, 25], 48, torch.device("cpu"))
    output = forward_row(chunk, TOKENS, placement, to_hidden=in_tiles)
    if in_tiles:
        assert output.shape == (48, 1, 32)
        head, targets = head_of(chunk), TOKENS.roll(-1)
        found = head_values(
            head.gather(output), head, targets, TEMPERATURE, entropy="differentiable"
        )
        logprobs, entropy = found.logprobs, found.entropy
    else:
        every = (output.squeeze(0).float() / TEMPERATURE).log_softmax(-1)
        logprobs = every.gather(1, TOKENS.roll(-1)[:, None]).squeeze(1)
        entropy = -(every.exp() * every).sum(-1)
    chunk.zero_grad()
    (WEIGHTS * (logprobs + 0.3 * entropy)).sum().backward()
    return {name: parameter.grad.clone() for name, parameter in chunk.named_parameters()}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("fp32_head", [False, True])
def test_tiles_and_logits_give_the_same_gradients(tied, fp32_head):
    config = tiny_config(model={"tie_embeddings": tied, "fp32_head": fp32_head})
    _, _, (chunk,) = build_tiny(config)
    expected, found = gradients(chunk, False), gradients(chunk, True)
    assert ("output_layer.weight" in found) == (not tied)
    for name, gradient in expected.items():
        assert float((found[name] - gradient).norm() / gradient.norm()) < 1e-5, name


def test_a_bf16_model_with_an_fp32_head_does_not_round_logits():
    from megatron_rl.models.attention import packed_placement
    from megatron_rl.models.forward import forward_row
    from megatron_rl.models.gpt.chunk import head_of

    placement = packed_placement([48], 48, torch.device("cpu"))
    logits = {}
    for fp32_head in (False, True):
        model = {"dtype": "bf16", "fp32_head": fp32_head}
        _, _, (chunk,) = build_tiny(tiny_config(model=model))
        with torch.no_grad():
            hidden = forward_row(chunk, TOKENS, placement, to_hidden=True).squeeze(1)
            logits[fp32_head] = forward_row(chunk, TOKENS, placement)[0]
    expected = hidden.double() @ head_of(chunk).weight.detach().double().t()
    assert logits[False].dtype == torch.bfloat16 and logits[True].dtype == torch.float32
    torch.testing.assert_close(logits[True].double(), expected, atol=1e-5, rtol=1e-5)
    assert float((logits[False].double() - expected).abs().max()) > 1e-3


def test_the_engine_samples_with_the_fp32_head():
    """Greedily: the token of the largest logit, with its log-probability, is that of fp32."""
    model = {"dtype": "bf16", "fp32_head": True}
    config = tiny_config(model=model)
    groups, megatron, chunks = build_tiny(config)
    from megatron_rl.models.attention import packed_placement
    from megatron_rl.models.forward import forward_row
    from megatron_rl.models.gpt.chunk import head_of

    engine = tiny_engine(config, groups, megatron, chunks)
    prompts = random_prompts([5, 9, 7])
    settings = SamplingSettings(samples=1, max_new_tokens=1, greedy=True, seed=4)
    for group in engine.generate(prompts, settings):
        tokens = torch.from_numpy(group.prompt.tokens)
        placement = packed_placement([len(tokens)], len(tokens), tokens.device)
        with torch.no_grad():
            hidden = forward_row(chunks[0], tokens, placement, to_hidden=True)[-1, 0]
        logits = head_of(chunks[0]).weight.detach().double() @ hidden.double()
        (answer,) = group.completions
        assert answer.tokens.tolist() == [int(logits.argmax())]
        assert answer.logprobs[0] == pytest.approx(float(logits.log_softmax(0).max()), abs=1e-3)
