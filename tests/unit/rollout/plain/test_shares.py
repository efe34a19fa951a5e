"""Rows shared out to threads: the same answers, routes and log-probabilities as of one thread."""

import threading

import numpy as np
import pytest
import torch

from megatron_rl.rollout.engine import SamplingSettings
from tests.support.tiny import build_tiny, random_prompts, tiny_config, tiny_engine

LENGTHS = [5, 1, 12, 7, 3, 9]


@pytest.fixture
def tiny():
    """A model, and two threads."""
    config = tiny_config()
    built = build_tiny(config)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield (config, *built)
    torch.set_num_threads(before)


def test_shares_have_all_rows_and_prompts_of_similar_length(monkeypatch):
    from megatron_rl.rollout.builtin.plain import shares

    monkeypatch.setattr(shares, "SHARE_ROWS", 4)
    prompt_of = [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    lengths = np.array(LENGTHS)[prompt_of]
    # By length prompts 2, 5, 3, 0, 4, 1: dealt in turns, 2 3 4 and 5 0 1.
    found = [rows.tolist() for rows in shares.shares_of(prompt_of, lengths, 2)]
    assert found == [[4, 5, 6, 7, 8, 9], [10, 11, 0, 1, 2, 3]]
    # Three would fit; they could not share four threads.
    assert [len(rows) for rows in shares.shares_of(prompt_of, lengths, 4)] == [6, 6]
    assert [len(rows) for rows in shares.shares_of(prompt_of, lengths, 9)] == [4, 4, 4]
    # One prompt, and fewer rows than two shares have.
    alone = shares.shares_of([0] * 9, np.full(9, 3), 2)
    assert [rows.tolist() for rows in alone] == [[0, 1, 2, 3, 4], [5, 6, 7, 8]]
    assert [rows.tolist() for rows in shares.shares_of([0] * 7, np.full(7, 3), 2)] == [[*range(7)]]
    assert [len(rows) for rows in shares.shares_of([], np.zeros(0), 2)] == [0]


def test_threads_give_what_one_gives(tiny, monkeypatch):
    from megatron_rl.models.gpt.chunk import routers_of
    from megatron_rl.rollout.builtin.plain import shares
    from megatron_rl.rollout.builtin.plain.step import PlainDecoder
    from megatron_rl.router.capture import RouterCapture

    capture = RouterCapture(routers_of(tiny[3]), [[1, 2]])
    seen = []
    advance = PlainDecoder.advance

    def watched(self):
        seen.append((threading.get_ident(), torch.get_num_threads()))
        advance(self)

    monkeypatch.setattr(PlainDecoder, "advance", watched)
    prompts = random_prompts(LENGTHS)
    settings = SamplingSettings(5, 24, seed=11, routes=True, router_logprobs=True)
    try:
        engine = tiny_engine(*tiny, capture=capture)
        alone = engine.generate(prompts, settings)
        assert set(seen) == {(threading.get_ident(), 2)}
        seen.clear()
        monkeypatch.setattr(shares, "SHARE_ROWS", 8)  # of 30 rows
        shared = engine.generate(prompts, settings)
    finally:
        capture.close()
    assert len({thread for thread, _ in seen}) == 2 and {count for _, count in seen} == {1}
    assert threading.get_ident() not in dict(seen) and torch.get_num_threads() == 2
    lengths = set()
    for group, expected in zip(shared, alone, strict=True):
        for one, other in zip(group.completions, expected.completions, strict=True):
            assert one.tokens.tolist() == other.tokens.tolist()
            np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-5)
            routes, others = one.routed_experts, other.routed_experts
            assert routes.ids.tolist() == others.ids.tolist()
            np.testing.assert_allclose(routes.logprobs, others.logprobs, atol=1e-5)
            lengths.add(len(one.tokens))
    assert len(lengths) > 4  # rows leave at different steps


def test_an_error_in_a_thread_ends_the_rollout(tiny, monkeypatch):
    from megatron_rl.rollout.builtin.plain import shares
    from megatron_rl.rollout.builtin.plain.step import PlainDecoder

    def fails(self):
        raise ArithmeticError("of a thread")

    monkeypatch.setattr(shares, "SHARE_ROWS", 2)
    monkeypatch.setattr(PlainDecoder, "advance", fails)
    engine, settings = tiny_engine(*tiny), SamplingSettings(4, 5, seed=1)
    with pytest.raises(ArithmeticError, match="of a thread"):
        engine.generate(random_prompts([3, 4]), settings)
    assert torch.get_num_threads() == 2
