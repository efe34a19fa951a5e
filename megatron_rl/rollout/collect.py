"""Scored groups, and what is made of them: training samples, metrics, lines of samples.jsonl."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, replace
from typing import Any, Sequence

import numpy as np
import torch

from megatron_rl.data.prompts import DataPart
from megatron_rl.records import RolloutGroup, Sample
from megatron_rl.rewards.base import Reward
from megatron_rl.rewards.overlong import overlong_offset


@dataclass(frozen=True)
class ScoredGroup:
    """A group and the reward of each of its completions, in order."""

    group: RolloutGroup
    rewards: tuple[Reward, ...]

    @property
    def values(self) -> np.ndarray:
        """Reward values, float64 [G]."""
        return np.array([reward.value for reward in self.rewards], dtype=np.float64)

    @property
    def is_informative(self) -> bool:
        """Whether the rewards differ. If not, all advantages are 0 and nothing is learnt."""
        return bool(np.ptp(self.values) > 0.0)


def shape_overlong(
    groups: Sequence[ScoredGroup], longest: int, buffer: int, penalty: float
) -> list[ScoredGroup]:
    """The groups with the overlong punishment added to each reward, and to its part ``overlong``.

    Args:
        groups: scored groups.
        longest, buffer, penalty: see `overlong_offset`.
    """

    def shaped(reward: Reward, length: int) -> Reward:
        offset = overlong_offset(length, longest, buffer, penalty)
        return replace(
            reward, value=reward.value + offset, parts={**reward.parts, "overlong": offset}
        )

    return [
        replace(
            scored,
            rewards=tuple(
                shaped(reward, answer.longest_turn)
                for reward, answer in zip(scored.rewards, scored.group.completions, strict=True)
            ),
        )
        for scored in groups
    ]


def to_samples(
    groups: Sequence[ScoredGroup], advantages: np.ndarray | torch.Tensor
) -> list[Sample]:
    """One training sample for each completion, prompt by prompt.

    Args:
        groups: P groups of G completions.
        advantages: [P, G].
    """
    samples = []
    for scored, row in zip(groups, advantages, strict=True):
        prompt = scored.group.prompt.tokens
        for completion, advantage in zip(scored.group.completions, row, strict=True):
            samples.append(
                Sample.of(
                    prompt,
                    completion.tokens,
                    float(advantage),
                    completion.logprobs,
                    completion.routed_experts,
                    written=completion.written,
                    kept=completion.kept,
                )
            )
    return samples


def rollout_metrics(groups: Sequence[ScoredGroup]) -> dict[str, tuple[float, float]]:
    """Metrics of this rank's groups as (sum, count). Add both over ranks before dividing.

    ``reward/std`` is the mean over groups of the standard deviation (over G) of the rewards.
    ``groups/zero_variance_fraction`` is the share of groups whose rewards are all the same.
    """
    rewards = [reward for scored in groups for reward in scored.rewards]
    completions = [answer for scored in groups for answer in scored.group.completions]
    return {
        "reward/mean": _sum_and_count(reward.value for reward in rewards),
        "reward/std": _sum_and_count(scored.values.std() for scored in groups),
        "response/length_mean": _sum_and_count(answer.num_written for answer in completions),
        "response/finished_fraction": _sum_and_count(answer.finished for answer in completions),
        "groups/zero_variance_fraction": _sum_and_count(
            np.ptp(scored.values) == 0.0 for scored in groups
        ),
    }


def part_sums(groups: Sequence[ScoredGroup]) -> dict[str, tuple[float, float]]:
    """Each part of this rank's rewards as (sum, number of completions with the part)."""
    values: dict[str, list[float]] = {}
    for scored in groups:
        for reward in scored.rewards:
            for part, value in reward.parts.items():
                values.setdefault(part, []).append(value)
    return {part: _sum_and_count(values[part]) for part in sorted(values)}


def source_sums(
    groups: Sequence[ScoredGroup], parts: Sequence[DataPart]
) -> dict[str, dict[str, tuple[float, float]]]:
    """Metrics of the data sets of a mixture, on this rank.

    Returns:
        ``data``: label -> (sum of rewards, completions). ``share``: label -> (groups of the data
        set, all groups).
    """
    firsts = [part.first for part in parts]
    mine: list[list[ScoredGroup]] = [[] for _ in parts]
    for scored in groups:
        mine[bisect_right(firsts, scored.group.prompt.index) - 1].append(scored)
    values = [[reward.value for scored in some for reward in scored.rewards] for some in mine]
    named = list(zip((part.label for part in parts), mine, values))
    return {
        "data": {label: _sum_and_count(numbers) for label, _, numbers in named if numbers},
        "share": {label: (float(len(some)), float(len(groups))) for label, some, _ in named},
    }


def _sum_and_count(numbers: Any) -> tuple[float, float]:
    numbers = [float(number) for number in numbers]
    return sum(numbers), float(len(numbers))


def shown_answers(groups: Sequence[ScoredGroup], limit: int) -> list[tuple[int, int]]:
    """At most ``limit`` answers for samples.jsonl, as (place of the group, place of the answer).

    First an answer of every prompt, then the second of each, and so on. Of more prompts than
    ``limit`` those spread evenly from the first to the last, which is in the last mini-batch.
    """
    if 0 < limit < len(groups):
        last = len(groups) - 1
        return [(last - round(i * last / max(1, limit - 1)), 0) for i in reversed(range(limit))]
    longest = max((len(scored.rewards) for scored in groups), default=0)
    order = [
        (place, n)
        for n in range(longest)
        for place, scored in enumerate(groups)
        if n < len(scored.rewards)
    ]
    return order[:limit]


def sample_row(scored: ScoredGroup, number: int) -> dict[str, Any]:
    """The object for samples.jsonl of an answer."""
    completion, reward = scored.group.completions[number], scored.rewards[number]
    return {
        "index": scored.group.prompt.index,
        "prompt": scored.group.prompt.text,
        "completion": completion.text,
        "reward": reward.value,
        "reason": reward.reason,
        "tokens": completion.num_written,
        "finished": completion.finished,
    }


def sample_rows(groups: Sequence[ScoredGroup], limit: int) -> list[dict[str, Any]]:
    """The objects of `shown_answers`."""
    return [sample_row(groups[place], number) for place, number in shown_answers(groups, limit)]
