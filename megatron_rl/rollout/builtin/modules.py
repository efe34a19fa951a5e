"""Decoding through Megatron's modules: every layout and every option that they know."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Sequence

import numpy as np
import torch

from megatron_rl.models.attention import packed_placement
from megatron_rl.models.forward import forward_stages
from megatron_rl.parallel.collectives import gather_first_dim
from megatron_rl.parallel.groups import Groups
from megatron_rl.records import Prompt, RoutedExperts
from megatron_rl.rollout.builtin import decoder
from megatron_rl.rollout.builtin.batches import split_by_tokens
from megatron_rl.rollout.builtin.decoder import BatchPlan
from megatron_rl.rollout.builtin.kept import KeptLog
from megatron_rl.rollout.builtin.kv_cache import KVCache, PrefillPlacement, decode_placement
from megatron_rl.rollout.builtin.rank_sync import RankSync
from megatron_rl.rollout.builtin.routes import RouteLog
from megatron_rl.rollout.builtin.sampler import draw

#: Finished rows leave the batch when at most this share of its rows still generates.
COMPACT_BELOW = 0.8


@dataclass
class _Rows:
    """State of the R rows still in the batch, on the device."""

    numbers: torch.Tensor  #: int64 [R], number of the row in the whole batch
    positions: torch.Tensor  #: int64 [R], position of the next token
    limits: torch.Tensor  #: int64 [R], most tokens of the answer
    uniforms: torch.Tensor  #: float64 [R, max_new_tokens]
    finished: torch.Tensor  #: bool [R]
    tokens: torch.Tensor  #: int64 [R], the newest
    longest: int  #: an upper bound of ``positions``, known without asking the device

    def select(self, rows: torch.Tensor) -> _Rows:
        return _Rows(
            self.numbers[rows],
            self.positions[rows],
            self.limits[rows],
            self.uniforms[rows],
            self.finished[rows],
            self.tokens[rows],
            self.longest,
        )


class ModuleDecoder:
    """`Decoder` by passes through the model's modules. Ranks that share experts run the same number
    of them.
    """

    def __init__(
        self,
        chunks: Sequence[torch.nn.Module],
        groups: Groups,
        ranks: RankSync,
        plan: BatchPlan,
        log: RouteLog | None,
        kept: KeptLog | None = None,
    ) -> None:
        """
        Args:
            chunks: this rank's chunks of the model.
            groups: process groups.
            ranks: what ranks agree on.
            plan: of the batch; an empty one only takes part in the other ranks' collectives.
            log: records the experts; None: they are not wanted.
            kept: records the kept tokens; None: they are not wanted here.
        """
        self._chunks, self._groups, self._ranks, self._plan = chunks, groups, ranks, plan
        self._device = plan.stop_ids.device
        self._log, self._kept = log, kept
        shape = (len(plan.lengths), plan.settings.max_new_tokens)
        self.tokens_out = torch.zeros(shape, dtype=torch.int64, device=self._device)
        self.logprobs_out = torch.zeros(shape, dtype=torch.float32, device=self._device)
        self._step = 0
        self._rows = _Rows(
            numbers=torch.arange(shape[0], device=self._device),
            positions=self._tensor(plan.lengths),
            limits=self._tensor(plan.limits),
            uniforms=plan.uniforms().to(self._device),
            finished=torch.zeros(shape[0], dtype=torch.bool, device=self._device),
            tokens=torch.zeros(shape[0], dtype=torch.int64, device=self._device),
            longest=plan.longest,
        )

    def begin(self) -> None:  # noqa: D102
        cache, logits = self._prefill(self._plan.batch.prompts)
        prompt_of = self._tensor(self._plan.batch.prompt_of)
        self._cache = cache.select(prompt_of)
        self._draw(None if logits is None else logits[prompt_of])

    def advance(self) -> None:  # noqa: D102
        logits = self._decode()
        self._rows.positions = self._rows.positions + 1
        self._rows.longest += 1
        self._step += 1
        self._draw(logits)

    def unfinished(self) -> tuple[int, int]:  # noqa: D102
        return self._ranks.count(~self._rows.finished)

    def compact(self, unfinished: int) -> None:  # noqa: D102
        if unfinished <= COMPACT_BELOW * len(self._rows.numbers):
            keep = (~self._rows.finished).nonzero().squeeze(1)
            self._rows, self._cache = self._rows.select(keep), self._cache.select(keep)

    def routes(self, lengths: list[int]) -> list[RoutedExperts]:  # noqa: D102
        assert self._log is not None, "they were wanted"
        return self._log.routes.take(self._plan.batch.prompt_of, lengths)

    def _draw(self, logits: torch.Tensor | None) -> None:
        rows, settings = self._rows, self._plan.settings
        if logits is not None and len(rows.tokens):
            logits = gather_first_dim(logits.T, self._groups.tensor).T
        uniform = None if settings.greedy else rows.uniforms[:, self._step]
        mask = None if self._kept is None or logits is None else self._kept.mask(logits)
        rows.tokens, logprobs = draw(logits, uniform, rows.tokens, settings, self._groups, mask)
        if self._kept is not None:
            self._kept.add(rows.numbers)
        self.tokens_out[rows.numbers, self._step] = rows.tokens
        self.logprobs_out[rows.numbers, self._step] = logprobs
        rows.finished |= self._plan.ends(rows.tokens) | (rows.limits <= self._step + 1)

    def _prefill(self, prompts: list[Prompt]) -> tuple[KVCache, torch.Tensor | None]:
        """The cache of the prompts, one row each, and the logits at their last tokens [P, V / tp],
        or None before the last pipeline stage.
        """
        cache = KVCache(len(prompts), max((len(p.tokens) for p in prompts), default=0) + 1)
        passes = split_by_tokens(prompts, decoder.PREFILL_TOKENS)
        logits, first = [], 0
        for number in range(self._ranks.most(len(passes))):
            packed = passes[number] if number < len(passes) else []
            lengths = [len(prompt.tokens) for prompt in packed]
            num_tokens = self._ranks.row_tokens(sum(lengths))
            row = np.zeros(num_tokens, dtype=np.int64)
            if packed:
                row[: sum(lengths)] = np.concatenate([prompt.tokens for prompt in packed])
            cache_rows = np.repeat(np.arange(first, first + len(packed)), lengths)
            placement = packed_placement(
                lengths,
                num_tokens,
                self._device,
                PrefillPlacement,
                cache=cache,
                rows=self._tensor(cache_rows),
            )
            tokens = self._tensor(row)
            if self._log is None:
                output = forward_stages(self._chunks, tokens, placement, self._groups)
            else:
                output = self._log.prefill(tokens, placement, lengths)
            if output is not None:
                logits.append(output[self._tensor(np.cumsum(lengths) - 1)])
            first += len(packed)
        return cache, torch.cat(logits) if logits else None

    def _decode(self) -> torch.Tensor | None:
        """Feed one token of each row: the logits [R, V / tp], or None before the last stage."""
        rows, tokens = self._rows, self._rows.tokens
        num_tokens = self._ranks.row_tokens(len(tokens))
        placement = decode_placement(self._cache, rows.positions, rows.longest, num_tokens)
        padded = torch.cat([tokens, tokens.new_zeros(num_tokens - len(tokens))])
        if self._log is None:
            logits = forward_stages(self._chunks, padded, placement, self._groups)
        else:
            logits = self._log.decode(padded, placement, rows.numbers, self._step)
        return None if logits is None else logits[: len(tokens)]

    def _tensor(self, numbers: Sequence[int] | np.ndarray) -> torch.Tensor:
        return torch.as_tensor(np.asarray(numbers, dtype=np.int64)).to(self._device)
