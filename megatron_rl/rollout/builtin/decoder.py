"""What decodes a batch: through Megatron's modules, or by the plain functions."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch

from megatron_rl.records import RoutedExperts
from megatron_rl.rollout.builtin.batches import Batch
from megatron_rl.rollout.builtin.sampler import uniforms
from megatron_rl.rollout.engine import SamplingSettings

#: Most tokens of one prefill pass, unless a single prompt is longer.
PREFILL_TOKENS = 4096


class Decoder(Protocol):
    """The rows of a batch while they are decoded. Legend: R rows, N longest answer."""

    @property
    def tokens_out(self) -> torch.Tensor:
        """int64 [R, N], anything behind an answer's end."""

    @property
    def logprobs_out(self) -> torch.Tensor:
        """fp32 [R, N], of these tokens."""

    def begin(self) -> None:
        """Prefill the prompts and draw the first token of each row."""

    def advance(self) -> None:
        """Feed each row's newest token to the model and draw its next."""

    def unfinished(self) -> tuple[int, int]:
        """Rows whose answers have not ended: here, and the most on a rank that has to run the same
        number of passes. Waits for the device.
        """

    def compact(self, unfinished: int) -> None:
        """Let finished rows leave, if there are enough of them."""

    def routes(self, lengths: list[int]) -> list[RoutedExperts]:
        """The experts of each prompt and answer, of these lengths of answers."""


@dataclass(frozen=True)
class BatchPlan:
    """A batch and what is fixed about it."""

    batch: Batch
    settings: SamplingSettings
    lengths: np.ndarray  #: int64 [R], of the rows' prompts
    limits: np.ndarray  #: int64 [R], most tokens of each answer
    stop_ids: torch.Tensor  #: int64, the tokens that end an answer; on the device

    @classmethod
    def of(
        cls, batch: Batch, settings: SamplingSettings, longest: int, stop_ids: torch.Tensor
    ) -> BatchPlan:
        """``longest``: tokens of a prompt and its answer together."""
        lengths = np.array([len(prompt.tokens) for prompt in batch.prompts], dtype=np.int64)
        lengths = lengths[batch.prompt_of]
        limits = np.minimum(settings.max_new_tokens, longest - lengths)
        return cls(batch, settings, lengths, limits, stop_ids)

    def select(self, rows: np.ndarray) -> BatchPlan:
        """Of some rows, int64 [R'], and the prompts that they answer."""
        batch = self.batch
        prompts, prompt_of = np.unique(np.array(batch.prompt_of)[rows], return_inverse=True)
        selected = Batch(
            [batch.prompts[number] for number in prompts],
            prompt_of.tolist(),
            [batch.sample_numbers[row] for row in rows],
        )
        return replace(self, batch=selected, lengths=self.lengths[rows], limits=self.limits[rows])

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt."""
        return int(self.lengths.max(initial=0))

    def uniforms(self) -> torch.Tensor:
        """The rows' uniform numbers, float64 [R, N]; with greedy none."""
        batch, settings = self.batch, self.settings
        names = [
            (batch.prompts[p].index, batch.prompts[p].first_sample(settings.samples) + number)
            for p, number in zip(batch.prompt_of, batch.sample_numbers)
        ]
        count = 0 if settings.greedy else settings.max_new_tokens
        return torch.from_numpy(uniforms(settings.seed, names, count))

    def ends(self, tokens: torch.Tensor) -> torch.Tensor:
        """bool [R]: which of the tokens int64 [R] end an answer."""
        return (tokens[:, None] == self.stop_ids).any(dim=1)
