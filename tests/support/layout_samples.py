"""Variants of the sequences that layouts train on: in turns, and with the prompt of another."""

from __future__ import annotations

import dataclasses

import numpy as np

from megatron_rl.records import KeptTokens, Sample


def in_turns(number: int, sample: Sample) -> Sample:
    """The sample with another mask: turns of one to four tokens with others' text between them.

    Every eighth has nothing that the policy wrote, and every eighth begins with the policy's words.
    """
    rng = np.random.default_rng(100 + number)
    length = len(sample.tokens)
    ends = np.cumsum(rng.integers(1, 5, length))
    written = np.searchsorted(ends, np.arange(length), side="right") % 2 == (number % 8 == 1)
    written = ~written if number % 8 != 2 else np.zeros(length, dtype=bool)
    written[0] = number % 8 == 1
    logprobs = np.where(written, -rng.random(length, dtype=np.float32), np.nan)
    return dataclasses.replace(
        sample, written=written, rollout_logprobs=logprobs.astype(np.float32)
    )


def with_kept(number: int, sample: Sample, vocab_size: int) -> Sample:
    """The sample with a set of up to 20 tokens for each written one. In every eighth sample some
    have none, which stands for the whole vocabulary.
    """
    rng = np.random.default_rng(300 + number)
    sets: list[np.ndarray] = []
    for token, written in zip(sample.tokens, sample.written):
        ids = np.append(rng.integers(0, vocab_size, int(rng.integers(20))), token)
        whole = number % 8 == 5 and rng.random() < 0.4
        sets.append(np.unique(ids) if written and not whole else ids[:0])
    sizes = np.array([len(ids) for ids in sets])
    return dataclasses.replace(sample, kept=KeptTokens.of_sizes(np.concatenate(sets), sizes))


def with_prompt(sample: Sample, other: Sample) -> Sample:
    """The sample behind the other's prompt: what is in front of the first trained token."""
    if sample is other:
        return sample

    def cut(one: Sample) -> int:
        return int(one.trained.argmax()) + 1 if one.trained.any() else 0

    def joined(name: str) -> np.ndarray:
        front, back = (getattr(one, name) for one in (other, sample))
        return np.concatenate([front[: cut(other)], back[cut(sample) :]])

    names = ("tokens", "written", "rollout_logprobs")
    return dataclasses.replace(sample, **{name: joined(name) for name in names})
