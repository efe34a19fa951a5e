"""How a rank's prompts are cut into batches that fit: rows to decode, and prompts to prefill."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Sequence

from megatron_rl.records import Prompt


@dataclass(frozen=True)
class Batch:
    """Rows decoded together: row r is answer sample_numbers[r] to prompts[prompt_of[r]]."""

    prompts: list[Prompt]
    prompt_of: list[int]
    sample_numbers: list[int]


def split_into_batches(prompts: Sequence[Prompt], samples: int, max_batch: int) -> list[Batch]:
    """Batches of nearly equal size, of at most ``max_batch`` rows.

    The answers to one prompt may be in several batches. Each of them then prefills the prompt.

    Args:
        prompts: of this rank.
        samples: answers to each prompt.
        max_batch: most rows of a batch.
    """
    num_rows = len(prompts) * samples
    num_batches = -(-num_rows // max_batch)
    batches = []
    for number in range(num_batches):
        first = number * num_rows // num_batches
        end = (number + 1) * num_rows // num_batches
        first_prompt, last_prompt = first // samples, (end - 1) // samples
        batches.append(
            Batch(
                prompts=list(prompts[first_prompt : last_prompt + 1]),
                prompt_of=[row // samples - first_prompt for row in range(first, end)],
                sample_numbers=[row % samples for row in range(first, end)],
            )
        )
    return batches


def split_by_tokens(prompts: list[Prompt], budget: int) -> list[list[Prompt]]:
    """Consecutive prompts with at most ``budget`` tokens together. A longer prompt stands alone."""
    passes: list[list[Prompt]] = []
    room = 0
    for prompt in prompts:
        if not passes or len(prompt.tokens) > room:
            passes.append([])
            room = budget
        passes[-1].append(prompt)
        room -= len(prompt.tokens)
    return passes
