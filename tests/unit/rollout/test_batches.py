"""Cutting prompts into batches and prefill passes."""

import pytest

from megatron_rl.rollout.builtin.batches import split_by_tokens, split_into_batches
from tests.support.tiny import random_prompts


def test_batches_cover_every_row_once_and_are_nearly_equal():
    batches = split_into_batches(random_prompts([1] * 5), samples=3, max_batch=4)
    assert [len(batch.prompt_of) for batch in batches] == [3, 4, 4, 4]
    rows = [
        (batch.prompts[p].index, number)
        for batch in batches
        for p, number in zip(batch.prompt_of, batch.sample_numbers)
    ]
    assert rows == [(index, number) for index in range(5) for number in range(3)]
    assert [len(batch.prompts) for batch in batches] == [1, 2, 2, 2]


def test_a_batch_may_hold_some_answers_of_one_prompt():
    batches = split_into_batches(random_prompts([1]), samples=5, max_batch=2)
    assert [batch.sample_numbers for batch in batches] == [[0], [1, 2], [3, 4]]
    assert split_into_batches([], samples=5, max_batch=2) == []


@pytest.mark.parametrize(
    "budget, expected", [(10, [[4, 6], [3], [12], [1, 2]]), (100, [[4, 6, 3, 12, 1, 2]])]
)
def test_prefill_passes_hold_consecutive_prompts_within_the_budget(budget, expected):
    passes = split_by_tokens(random_prompts([4, 6, 3, 12, 1, 2]), budget)
    assert [[len(prompt.tokens) for prompt in packed] for packed in passes] == expected
