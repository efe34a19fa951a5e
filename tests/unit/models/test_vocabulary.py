"""A vocabulary padded for tensor parallelism: no token of the padding is ever likely."""

import torch

from megatron_rl.models.vocabulary import padded_vocabulary
from megatron_rl.parallel.vocab_tiles import NEVER
from tests.support.ranks import run_on_ranks
from tests.support.tiny import build_tiny, random_prompts, tiny_config, tiny_engine

MODEL = {"vocab_size": 61}


def test_the_next_multiple():
    assert [padded_vocabulary(size, 4) for size in (60, 61, 64, 65)] == [60, 64, 64, 68]


def logits_and_answers(tensor):
    """On a rank: logits of fixed tokens, this rank's columns, and greedy answers of the engine."""
    from megatron_rl.models.attention import packed_placement
    from megatron_rl.models.forward import forward_row
    from megatron_rl.models.parameters import weight_views
    from megatron_rl.rollout.engine import SamplingSettings

    config = tiny_config(model=MODEL, parallel={"tensor": tensor})
    groups, megatron, chunks = build_tiny(config)
    tokens = torch.arange(24) * 7 % 61
    with torch.no_grad():
        logits = forward_row(chunks[0], tokens, packed_placement([24], 24, torch.device("cpu")))[0]
    engine = tiny_engine(config, groups, megatron, chunks)
    settings = SamplingSettings(samples=2, max_new_tokens=8, temperature=3.0, seed=4)
    answers = engine.generate(random_prompts([5, 9]), settings)
    drawn = [c.tokens.tolist() for group in answers for c in group.completions]
    sizes = {view.name: tuple(view.global_shape()) for view in weight_views(chunks, groups)}
    wholes = {
        view.name: view.gather(view.parameter.detach()).shape
        for view in weight_views(chunks, groups)
        if view.padding
    }
    return logits, drawn, sizes, wholes


def test_a_split_vocabulary_with_padding_gives_what_one_process_gives():
    ((expected, answers, sizes, _),) = run_on_ranks(1, logits_and_answers, 1)
    ranks = run_on_ranks(2, logits_and_answers, 2)
    found = torch.cat([rank[0] for rank in ranks], dim=-1)
    assert found.shape[-1] == 62 and bool((found[:, 61:] == NEVER).all())
    torch.testing.assert_close(found[:, :61], expected, atol=1e-5, rtol=0)
    assert max(max(tokens) for tokens in answers) > 50  # a temperature at which anything is drawn
    for rank in ranks:
        assert rank[1] == answers
        assert rank[2]["embedding.word_embeddings.weight"] == (61, 32)
        assert rank[2]["output_layer.weight"] == sizes["output_layer.weight"] == (61, 32)
        assert set(rank[3].values()) == {(61, 32)} and len(rank[3]) == 2
