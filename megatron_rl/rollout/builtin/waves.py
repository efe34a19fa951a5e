"""How a rank's prompts are cut into pieces that fit: waves of rows, and prefill passes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Sequence

from megatron_rl.records import Prompt


@dataclass(frozen=True)
class Wave:
    """Rows generated together: row r is answer sample_numbers[r] to prompts[prompt_of[r]]."""

    prompts: list[Prompt]
    prompt_of: list[int]
    sample_numbers: list[int]


def split_into_waves(prompts: Sequence[Prompt], samples: int, max_batch: int) -> list[Wave]:
    """Waves of nearly equal size, at most ``max_batch`` rows each.

    The answers to one prompt may be in two waves, or more; each of them then prefills it.
    """
    num_rows = len(prompts) * samples
    num_waves = -(-num_rows // max_batch)
    waves = []
    for number in range(num_waves):
        first = number * num_rows // num_waves
        end = (number + 1) * num_rows // num_waves
        first_prompt, last_prompt = first // samples, (end - 1) // samples
        waves.append(
            Wave(
                prompts=list(prompts[first_prompt : last_prompt + 1]),
                prompt_of=[row // samples - first_prompt for row in range(first, end)],
                sample_numbers=[row % samples for row in range(first, end)],
            )
        )
    return waves


def split_by_tokens(prompts: list[Prompt], budget: int) -> list[list[Prompt]]:
    """Consecutive prompts, together at most ``budget`` tokens; a longer prompt stands alone."""
    batches: list[list[Prompt]] = []
    room = 0
    for prompt in prompts:
        if not batches or len(prompt.tokens) > room:
            batches.append([])
            room = budget
        batches[-1].append(prompt)
        room -= len(prompt.tokens)
    return batches
