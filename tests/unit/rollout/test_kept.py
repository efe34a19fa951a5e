"""The kept tokens of the built-in engine, against whole logits, and their record by hand."""

import numpy as np
import pytest
import torch

from megatron_rl.rollout.engine import SamplingSettings
from tests.support.tiny import build_tiny, random_prompts, spell, tiny_config, tiny_engine

LENGTHS = (5, 3, 8, 6)
TRUNCATED = dict(top_k=9, top_p=0.8, temperature=0.9, kept=True)


@pytest.fixture(scope="module")
def tiny():
    config = tiny_config()
    return config, *build_tiny(config)


def sets_of(kept):
    return [sorted(ids.tolist()) for ids in np.split(kept.ids, kept.offsets[1:-1])]


def slow_set(logprobs, top_k, top_p):
    """The likeliest tokens, one after the other, until their share of the top-k reaches top_p."""
    order = np.argsort(-logprobs)[:top_k]
    probs, reached, kept = np.exp(logprobs[order]), 0.0, []
    for token, p in zip(order, probs):
        kept.append(int(token))
        reached += p
        if reached >= top_p * probs.sum():
            break
    return sorted(kept)


def whole_logprobs(tiny, tokens):
    """log softmax of all places of a sequence at the temperature, float64 [M, V]."""
    from megatron_rl.models.attention import packed_placement
    from megatron_rl.models.forward import forward_stages

    _, groups, _, chunks = tiny
    row, placement = torch.as_tensor(tokens), packed_placement([len(tokens)], len(tokens), "cpu")
    chunks[0].eval()
    with torch.no_grad():
        logits = forward_stages(chunks, row, placement, groups)
    return (logits.double() / TRUNCATED["temperature"]).log_softmax(-1).numpy()


@pytest.mark.parametrize("through", ["plain functions", "modules"])
def test_sets_and_log_probabilities_are_those_of_whole_logits(tiny, through):
    from megatron_rl.rollout.builtin.plain.plan import Plan

    plan = Plan("the test wants modules") if through == "modules" else None
    engine = tiny_engine(*tiny, plan=plan, max_batch=9)
    assert engine.plan.is_plain == (through != "modules")
    groups = engine.generate(random_prompts(LENGTHS), SamplingSettings(4, 20, seed=3, **TRUNCATED))
    sizes, lengths = [], set()
    for group in groups:
        for answer in group.completions:
            tokens = np.concatenate([group.prompt.tokens, answer.tokens])
            logprobs = whole_logprobs(tiny, tokens)[len(group.prompt.tokens) - 1 : -1]
            expected = [slow_set(row, TRUNCATED["top_k"], TRUNCATED["top_p"]) for row in logprobs]
            assert sets_of(answer.kept) == expected
            over = [
                row[token] - np.log(np.exp(row[ids]).sum())
                for row, token, ids in zip(logprobs, answer.tokens, expected)
            ]
            np.testing.assert_allclose(answer.logprobs, over, atol=2e-5)
            sizes += [len(ids) for ids in expected]
            lengths.add(len(answer.tokens))
    assert len(set(sizes)) > 4 and max(sizes) <= 9 and len(lengths) > 4  # rows leave at all times


def test_the_answers_are_those_without_kept_tokens(tiny):
    engine, prompts = tiny_engine(*tiny), random_prompts(LENGTHS)
    with_sets, without = (
        engine.generate(prompts, SamplingSettings(4, 20, seed=3, **{**TRUNCATED, "kept": kept}))
        for kept in (True, False)
    )
    for one, other in zip(with_sets, without, strict=True):
        for answer, plain in zip(one.completions, other.completions, strict=True):
            assert answer.tokens.tolist() == plain.tokens.tolist() and plain.kept is None
            assert (answer.logprobs > plain.logprobs).all()


def test_greedy_answers_have_none(tiny):
    settings = SamplingSettings(1, 4, greedy=True, **TRUNCATED)
    for group in tiny_engine(*tiny, decode=spell).generate(random_prompts(LENGTHS), settings):
        assert group.completions[0].kept is None


def test_a_record_is_taken_row_by_row():
    """Two rows, then one of them in the other's place beside a place that is nobody's."""
    from megatron_rl.rollout.builtin.kept import KeptLog

    log = KeptLog()
    steps = [([1, 0], [[2, 3], [0]]), ([1, 0], [[4], [1, 2]]), ([1, 2], [[0, 4], [1]])]
    for numbers, sets in steps:
        mask = log.mask(torch.zeros(len(numbers), 5))
        mask.zero_()
        for row, ids in zip(mask, sets):
            row[ids] = True
        log.add(torch.tensor(numbers))
    # Row 0 ended with its first token, what was drawn behind it is not wanted; row 1 has three.
    assert [sets_of(kept) for kept in log.take([1, 3])] == [[[0]], [[2, 3], [4], [0, 4]]]
    assert KeptLog().take([]) == []
