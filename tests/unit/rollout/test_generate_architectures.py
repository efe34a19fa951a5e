"""Decoding with a cache gives the log-probabilities of one causal pass, whatever the attention."""

import numpy as np
import pytest
import torch

from megatron_rl.rollout.engine import SamplingSettings
from tests.support.layout_cases import DENSE, LATENT, OVER_HEADS, WHOLE_QUERIES
from tests.support.tiny import build_tiny, random_prompts, tiny_config, tiny_engine, uneven_norms

LENGTHS = [5, 1, 12, 7, 3, 9]
ARCHITECTURES = {
    "grouped-query attention": {},
    "latent attention": LATENT,
    "latent attention, whole queries, one head": {**WHOLE_QUERIES, "num_attention_heads": 1},
    "norm over heads": OVER_HEADS,
    "dense": DENSE,
}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_logprobs_equal_those_of_scoring_packed_sequences(architecture):
    from megatron_rl.models.attention import packed_placement
    from megatron_rl.models.forward import forward_row

    config = tiny_config(model=ARCHITECTURES[architecture])
    groups, megatron_config, chunks = build_tiny(config)
    uneven_norms(chunks[0])
    engine = tiny_engine(config, groups, megatron_config, chunks, max_batch=7)
    settings = SamplingSettings(samples=3, max_new_tokens=16, temperature=1.3, top_p=0.9, seed=2)
    sequences, expected = [], []
    for group in engine.generate(random_prompts(LENGTHS), settings):
        for answer in group.completions:
            sequences.append(np.concatenate([group.prompt.tokens, answer.tokens]))
            expected.append((len(group.prompt.tokens), answer.logprobs))
    row = torch.tensor(np.concatenate(sequences))
    placement = packed_placement([len(s) for s in sequences], len(row), row.device)
    with torch.no_grad():
        logits = forward_row(chunks[0], row, placement).squeeze(0)
    scored = (logits / 1.3).log_softmax(-1).gather(1, row.roll(-1)[:, None]).squeeze(1)
    start = 0
    for sequence, (prompt_length, logprobs) in zip(sequences, expected):
        part = scored[start + prompt_length - 1 : start + len(sequence) - 1]
        np.testing.assert_allclose(logprobs, part.numpy(), atol=1e-5)
        assert logprobs.dtype == np.float32
        start += len(sequence)
