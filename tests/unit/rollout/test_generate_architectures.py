"""Decoding with a cache gives the log-probabilities of one causal pass, for every family's options,
by the plain functions and through Megatron's modules.
"""

import numpy as np
import pytest
import torch

from megatron_rl.rollout.engine import SamplingSettings
from tests.support.layout_cases import (
    DEEPSEEK,
    DENSE,
    GATED,
    GROUPS,
    LATENT,
    OVER_HEADS,
    WHOLE_QUERIES,
)
from tests.support.tiny import build_tiny, random_prompts, tiny_config, tiny_engine, uneven_norms

LENGTHS = [5, 1, 12, 7, 3, 9]
YARN = {
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 0.7,
    "mscale_all_dim": 1.0,
}
ARCHITECTURES = {
    "grouped-query attention": {},
    "latent attention": LATENT,
    "latent attention, whole queries, one head": {**WHOLE_QUERIES, "num_attention_heads": 1},
    "norm over heads": OVER_HEADS,
    "dense": DENSE,
    "as OLMoE": {**OVER_HEADS, "router_pre_softmax": True, "num_query_groups": 4},
    "as Mixtral": {"qk_norm": False, "num_query_groups": 1},
    "as Qwen2-MoE": {
        **GATED,
        "qk_norm": False,
        "qkv_bias": True,
        "router_pre_softmax": True,
        "moe_layer_freq": [0, 1],
    },
    "as DeepSeek-V3": {
        **LATENT,
        **DEEPSEEK,
        "num_layers": 3,
        "num_experts": 8,
        "moe_layer_freq": [0, 1, 1],
        "yarn": YARN,
    },
    "sigmoid, one expert a token": {"router_score": "sigmoid", "moe_top_k": 1},
    "groups of experts, tied": {
        **GROUPS,
        "num_experts": 8,
        "router_score": "sigmoid",
        "tie_embeddings": True,
    },
}


def uneven(chunk):
    """Norms, biases of projections and of experts that matter."""
    uneven_norms(chunk)
    for name, tensor in [*chunk.named_parameters(), *chunk.named_buffers()]:
        if name.endswith(".bias") or name.endswith("expert_bias"):
            generator = torch.Generator().manual_seed(6)
            tensor.data.copy_(torch.randn(tensor.shape, generator=generator) * 0.2)


@pytest.mark.parametrize("through", ["plain functions", "modules"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_logprobs_equal_those_of_scoring_packed_sequences(architecture, through):
    from megatron_rl.models.attention import packed_placement
    from megatron_rl.models.forward import forward_row
    from megatron_rl.parallel.vocab_logprobs import vocab_logprobs

    config = tiny_config(model=ARCHITECTURES[architecture])
    groups, megatron_config, chunks = build_tiny(config)
    uneven(chunks[0])
    from megatron_rl.rollout.builtin.plain.plan import Plan

    plan = Plan("the test compares") if through == "modules" else None
    engine = tiny_engine(config, groups, megatron_config, chunks, max_batch=7, plan=plan)
    assert engine.plan.is_plain == (through == "plain functions"), engine.plan
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
    scored, _ = vocab_logprobs(logits, row.roll(-1), 1.3, groups.tensor)
    start = 0
    for sequence, (prompt_length, logprobs) in zip(sequences, expected):
        part = scored[start + prompt_length - 1 : start + len(sequence) - 1]
        np.testing.assert_allclose(logprobs, part.numpy(), atol=1e-5)
        assert logprobs.dtype == np.float32
        start += len(sequence)
