"""Dynamic sampling: the prompts drawn and the groups chosen, on any number of ranks."""

import numpy as np
import pytest
import torch.distributed as dist

from megatron_rl.data.prompts import PromptSource
from megatron_rl.records import Completion, Prompt, RolloutGroup
from megatron_rl.rewards.base import Reward
from megatron_rl.rollout.collect import ScoredGroup, shape_overlong
from megatron_rl.rollout.dynamic import choose, collect_informative, next_draw
from tests.support.ranks import run_on_ranks
from tests.support.tiny import cpu_device


def scored(index, values, lengths=(1, 1), attempt=0):
    answers = tuple(
        Completion(np.ones(n, dtype=np.int64), np.zeros(n, dtype=np.float32), True, f"{attempt}")
        for n in lengths
    )
    group = RolloutGroup(Prompt(index, np.array([1]), "p", {}), answers)
    return ScoredGroup(group, tuple(Reward(value, {"solved": value}, "") for value in values))


class Sampler:
    """Prompts 0, 1, 2... in order; those in ``dull`` get equal rewards."""

    def __init__(self, dull, size=100):
        prompts = [Prompt(i, np.array([1]), "p", {}) for i in range(size)]
        self.source = PromptSource(prompts, seed=1, shuffle=False)
        self.dull, self.asked, self.drawn = set(dull), [], []

    def draw(self, n):
        self.drawn.append(n)
        return self.source.next_batch(n)

    def generate(self, prompts, attempt):
        self.asked.append([prompt.index for prompt in prompts])
        return [
            scored(p.index, (0.5, 0.5) if p.index in self.dull else (0.0, 1.0), attempt=attempt)
            for p in prompts
        ]

    def collect(self, wanted, max_rounds):
        return collect_informative(self.draw, self.generate, wanted, max_rounds, dist.group.WORLD)


def indices(groups):
    return [group.group.prompt.index for group in groups]


def on_ranks(dull, wanted, max_rounds, size=100):
    sampler = Sampler(dull, size)
    batch = sampler.collect(wanted, max_rounds)
    attempts = [group.group.completions[0].text for group in batch.chosen]
    state = sampler.source.state_dict()
    chosen, drawn = indices(batch.chosen), indices(batch.drawn)
    return chosen, attempts, batch.rounds, sampler.drawn, state["offset"], drawn


@pytest.fixture(autouse=True)
def world_of_one():
    cpu_device()


def test_enough_in_the_first_round():
    chosen, _, rounds, drawn, offset, generated = on_ranks([], 4, 5)
    assert (chosen, rounds, drawn, offset) == ([0, 1, 2, 3], 1, [4], 4)
    assert generated == [0, 1, 2, 3]


def test_more_are_drawn_at_the_rate_found_so_far():
    # round 0: 0..3, of which 1 is informative: 3 missing, at 1/4 that takes 12, at most 4
    # round 1: 4..7, all informative: 3 of them are wanted, the last is dropped
    chosen, attempts, rounds, drawn, offset, generated = on_ranks([0, 1, 3], 4, 5)
    assert (chosen, rounds, drawn, offset) == ([2, 4, 5, 6], 2, [4, 4], 8)
    assert attempts == ["0", "1", "1", "1"]
    assert generated == list(range(8))


def test_gives_up_and_fills_up_with_the_first_dull_groups():
    chosen, _, rounds, drawn, offset, _ = on_ranks(set(range(100)) - {5}, 4, 3)
    # round 2: 3 missing at 1 of 8: at most 4
    assert (chosen, rounds, drawn, offset) == ([0, 1, 2, 5], 3, [4, 4, 4], 12)


def test_the_cursor_goes_on_across_epochs():
    # 6 prompts, 2 of them informative: the second epoch's are other groups
    chosen, attempts, rounds, _, offset, _ = on_ranks([0, 1, 3, 4], 4, 5, size=6)
    assert (chosen, attempts) == ([2, 5, 2, 5], ["0", "1", "2", "2"])
    assert rounds == 3 and offset == 6


def test_the_number_of_ranks_changes_nothing():
    for dull, wanted, rounds in ([[0, 1, 3], 4, 5], [range(1, 90), 4, 3], [[0, 2, 4, 5, 6], 5, 4]):
        alone = on_ranks(set(dull), wanted, rounds)
        for ranks in (2,):
            answers = run_on_ranks(ranks, on_ranks, set(dull), wanted, rounds)
            for answer in answers:
                assert answer[:-1] == alone[:-1]
            assert sorted(sum((answer[-1] for answer in answers), [])) == sorted(alone[-1])


def test_two_steps_on_a_resumed_cursor():
    first = Sampler([0, 1, 3, 8])
    first.collect(4, 5)
    resumed = Sampler([0, 1, 3, 8])
    resumed.source.load_state_dict(first.source.state_dict())
    assert (
        indices(first.collect(4, 5).chosen)
        == indices(resumed.collect(4, 5).chosen)
        == [
            9,
            10,
            11,
            12,
        ]
    )


def test_next_draw():
    assert next_draw(wanted=8, found=0, drawn=0) == 8
    assert next_draw(8, 0, 8) == 8
    assert next_draw(8, 6, 8) == 3  # 2 missing at 3/4: 2.67
    assert next_draw(8, 7, 8) == 2  # 1 missing at 7/8
    assert next_draw(8, 1, 80) == 8


def test_choose():
    assert choose([True, False, True, True], 2) == [0, 2]
    assert choose([False, True, False, False], 3) == [0, 1, 2]
    assert choose([False, True, False], 3) == [0, 1, 2]


def test_overlong_shaping_is_part_of_the_reward():
    group = scored(0, (1.0, 1.0), lengths=(2, 9))
    assert not group.is_informative
    (shaped,) = shape_overlong([group], longest=10, buffer=4, penalty=1.0)
    assert [reward.value for reward in shaped.rewards] == [1.0, 0.25]
    assert shaped.rewards[1].parts == {"solved": 1.0, "overlong": -0.75}
    assert shaped.rewards[1].reason == group.rewards[1].reason
    assert shaped.is_informative and shaped.group is group.group
