"""Scored groups, samples, metrics and sample lines, with numbers worked out by hand."""

import numpy as np
import pytest

from megatron_rl.records import Completion, Prompt, RolloutGroup
from megatron_rl.rewards.base import Reward
from megatron_rl.rollout.collect import (
    ScoredGroup,
    part_sums,
    rollout_metrics,
    sample_rows,
    shown_answers,
    to_samples,
)


def completion(tokens, finished, text):
    tokens = np.array(tokens)
    return Completion(tokens, -np.arange(1, len(tokens) + 1, dtype=np.float32), finished, text)


def judged(verifier):
    """Two fixed answers to every prompt, with their rewards."""
    answers = completion([7, 8, 9], True, "yes"), completion([4], False, "no")
    return [
        ScoredGroup(
            RolloutGroup(prompt, answers),
            tuple(verifier(prompt.record, answer.text) for answer in answers),
        )
        for prompt in prompts()
    ]


def prompts():
    tokens = np.array([1, 2, 3]), np.array([5, 6])
    return [Prompt(i, t, f"p{i}", {"right": r}) for i, t, r in zip((10, 11), tokens, ("yes", "*"))]


def verifier(record, text):
    if record["right"] == "*":
        return Reward(0.25, {"solved": 0.0, "well_formed": 1.0}, "neither")
    right = text == record["right"]
    return Reward(float(right), {"solved": float(right), "well_formed": float(right)}, text)


@pytest.fixture
def scored():
    return judged(verifier)


def test_samples_carry_prompt_completion_and_advantage(scored):
    samples = to_samples(scored, np.array([[1.0, -1.0], [0.5, 0.0]]))
    assert [s.tokens.tolist() for s in samples] == [
        [1, 2, 3, 7, 8, 9],
        [1, 2, 3, 4],
        [5, 6, 7, 8, 9],
        [5, 6, 4],
    ]
    assert [s.written.tolist() for s in samples[1:]] == [
        [False] * 3 + [True],
        [False] * 2 + [True] * 3,
        [False] * 2 + [True],
    ]
    assert [s.advantage for s in samples] == [1.0, -1.0, 0.5, 0.0]
    assert [s.rollout_logprobs[3:].tolist() for s in samples[:2]] == [[-1.0, -2.0, -3.0], [-1.0]]


@pytest.mark.parametrize("shape", [(1, 2), (2, 3)])
def test_advantages_of_another_shape_are_refused(scored, shape):
    with pytest.raises(ValueError):
        to_samples(scored, np.zeros(shape))


def test_metrics_by_hand(scored):
    assert rollout_metrics(scored) == {
        "reward/mean": (1.5, 4.0),
        "reward/std": (0.5, 2.0),
        "response/length_mean": (8.0, 4.0),
        "response/finished_fraction": (2.0, 4.0),
        "groups/zero_variance_fraction": (1.0, 2.0),
    }


def test_metrics_of_a_rank_without_prompts_add_nothing(scored):
    empty = rollout_metrics([])
    assert empty.keys() == rollout_metrics(scored).keys()
    assert set(empty.values()) == {(0.0, 0.0)}


def test_parts_are_added_over_the_completions_that_have_them(scored):
    assert part_sums(scored) == {"solved": (1.0, 4.0), "well_formed": (3.0, 4.0)}
    assert part_sums(judged(lambda record, text: Reward(1.0))) == {}

    def now_and_then(record, text):
        return Reward(1.0, {"style": 0.25, **({"tone": 0.5} if text == "yes" else {})})

    assert part_sums(judged(now_and_then)) == {"style": (1.0, 4.0), "tone": (1.0, 2.0)}


def test_sample_rows_take_every_prompt_before_a_second_answer(scored):
    rows = sample_rows(scored, 3)
    assert [(row["prompt"], row["completion"]) for row in rows] == [
        ("p10", "yes"),
        ("p11", "yes"),
        ("p10", "no"),
    ]
    assert rows[2] == {
        "index": 10,
        "prompt": "p10",
        "completion": "no",
        "reward": 0.0,
        "reason": "no",
        "tokens": 1,
        "finished": False,
    }
    assert len(sample_rows(scored, 99)) == 4
    assert sample_rows(scored, 0) == []


def test_of_many_prompts_those_spread_over_the_step_are_shown(scored):
    many = [scored[0]] * 9
    assert shown_answers(many, 4) == [(0, 0), (3, 0), (5, 0), (8, 0)]
    assert shown_answers(many, 1) == [(8, 0)]  # in the last mini-batch
    assert shown_answers(many, 9) == [(place, 0) for place in range(9)]
    assert shown_answers(many, 11)[9:] == [(0, 1), (1, 1)]
