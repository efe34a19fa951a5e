"""Decoding by the plain functions: rows of fixed places, one function for a step.

On CUDA a step is captured as a CUDA graph for each number of rows and length of the cache that
occurs, and replayed; nothing in it waits for the device. Legend: R rows, N longest answer.
"""

from __future__ import annotations

from typing import Sequence

import numpy as np
import torch

from megatron_rl.models.attention import packed_placement
from megatron_rl.records import Prompt, RoutedExperts
from megatron_rl.rollout.builtin import decoder
from megatron_rl.rollout.builtin.batches import split_by_tokens
from megatron_rl.rollout.builtin.decoder import BatchPlan
from megatron_rl.rollout.builtin.kept import KeptLog
from megatron_rl.rollout.builtin.plain.buckets import Buckets
from megatron_rl.rollout.builtin.plain.cache import Cache, Decoding, Parts, Prefill
from megatron_rl.rollout.builtin.plain.forward import PlainModel
from megatron_rl.rollout.builtin.plain.graphs import Steps
from megatron_rl.rollout.builtin.routes import Routes
from megatron_rl.rollout.builtin.sampler import draw


class PlainDecoder:
    """`Decoder` by the plain functions. Rows that still generate are the first of all; another
    takes the place of one that has finished.
    """

    def __init__(
        self,
        model: PlainModel,
        plan: BatchPlan,
        routes: Routes | None,
        buckets: Buckets,
        steps: Steps,
        kept: KeptLog | None = None,
    ) -> None:
        """
        Args:
            model: this rank's part.
            plan: of the batch, which may be empty.
            routes: keeps the experts; None: they are not wanted.
            buckets: the numbers of rows and the lengths that occur.
            steps: runs a step, captured or not.
            kept: records the kept tokens; None: they are not wanted here.
        """
        self._model, self._routes, self._kept = model, routes, kept
        self._buckets, self._steps = buckets, steps
        self._settings, self._ends = plan.settings, plan.ends
        self._prompts = _Sorted(plan.batch.prompts, plan.batch.prompt_of)
        device, num_rows = model.device, len(plan.lengths)
        self._num_rows, order = num_rows, self._prompts.rows
        # The last row of the results takes what is drawn for places without a row.
        shape = (num_rows + 1, plan.settings.max_new_tokens)
        self._tokens_out = torch.zeros(shape, dtype=torch.int64, device=device)
        self._logprobs_out = torch.zeros(shape, dtype=torch.float32, device=device)
        self._step = torch.zeros((), dtype=torch.int64, device=device)
        make = lambda values: torch.as_tensor(values).to(device)  # noqa: E731
        self._numbers, self._positions = make(order), make(plan.lengths[order])
        self._limits, self._uniforms = make(plan.limits[order]), make(plan.uniforms()[order])
        self._finished = torch.zeros(num_rows, dtype=torch.bool, device=device)
        self._tokens = torch.zeros(num_rows, dtype=torch.int64, device=device)
        #: int64 [R], of the rows' newest tokens; rows that have finished may have been passed by
        self._reached = plan.lengths[order] - 1
        self._most = plan.longest + plan.settings.max_new_tokens
        like = torch.empty(0, dtype=model.dtype, device=device)
        self._cache = Cache(model.widths(), self._roomy(self._next_parts(num_rows)), like)

    @property
    def tokens_out(self) -> torch.Tensor:  # noqa: D102
        return self._tokens_out[:-1]

    @property
    def logprobs_out(self) -> torch.Tensor:  # noqa: D102
        return self._logprobs_out[:-1]

    @torch.inference_mode()
    def begin(self) -> None:  # noqa: D102
        if self._num_rows:
            self._draw(self._prefill())
            self._keep(self._num_rows)

    @torch.inference_mode()
    def advance(self) -> None:  # noqa: D102
        if not self._num_rows:
            return
        rows = self._buckets.rows(self._num_rows, len(self._numbers))
        parts = self._next_parts(rows)
        self._reached += 1
        if not self._cache.holds(parts):
            self._lay_out(parts)
        length = max(length for _, length in parts)
        self._steps.run((rows, length), lambda: self._advance(rows, parts))
        self._keep(rows)

    @torch.inference_mode()
    def unfinished(self) -> tuple[int, int]:  # noqa: D102
        count = int((~self._finished[: self._num_rows]).sum()) if self._num_rows else 0
        return count, count

    @torch.inference_mode()
    def compact(self, unfinished: int) -> None:
        """Rows behind the first ``unfinished`` that still generate take the places of finished
        ones.
        """
        if not self._buckets.worth_moving(self._num_rows, unfinished):
            return
        finished = self._finished[: self._num_rows]
        holes = finished[:unfinished].nonzero().squeeze(1)
        movers = (~finished[unfinished:]).nonzero().squeeze(1) + unfinished
        for tensor in self._row_tensors():
            tensor[holes] = tensor[movers]
        sources = np.arange(len(self._reached))
        sources[holes.cpu().numpy()] = movers.cpu().numpy()
        self._reached = self._reached[sources]
        # What is drawn behind them from now on is nobody's.
        self._numbers[unfinished:] = len(self._tokens_out) - 1
        self._finished[unfinished:] = True
        self._num_rows = unfinished
        if unfinished:
            rows = self._buckets.rows(unfinished, len(self._numbers))
            self._lay_out(self._next_parts(rows), sources[:rows])

    def routes(self, lengths: list[int]) -> list[RoutedExperts]:  # noqa: D102
        assert self._routes is not None, "they were wanted"
        return self._routes.take(self._prompts.prompt_of_row, lengths)

    def _next_parts(self, rows: int) -> Parts:
        """Of the first rows in the next step, and the positions that it reads."""
        if not rows:
            return [(slice(0, 0), 0)]
        return self._buckets.parts(self._reached[:rows] + 2, self._most)

    def _roomy(self, parts: Parts) -> Parts:
        """With the positions that the cache should have."""
        return [(rows, self._buckets.capacity(length, self._most)) for rows, length in parts]

    def _lay_out(self, parts: Parts, sources: np.ndarray | None = None) -> None:
        roomy = self._roomy(parts)
        if sources is None:  # parts that have room stay where they are
            roomy = [
                old if old[0] == rows and old[1] >= length else new
                for (rows, length), new, old in zip(parts, roomy, self._cache.parts, strict=True)
            ]
        self._cache.lay_out(roomy, sources)
        self._steps.forget()

    @property
    def _keeps_logits(self) -> bool:
        return self._routes is not None and self._routes.num_logprobs > 0

    def _row_tensors(self) -> Sequence[torch.Tensor]:
        state = (self._numbers, self._positions, self._limits, self._finished, self._tokens)
        return (*state, self._uniforms)

    def _advance(self, rows: int, parts: Parts) -> None:
        """One step of the first ``rows``: feed their tokens, draw the next."""
        positions = self._positions[:rows]
        place = Decoding(
            self._cache,
            positions,
            self._model.rotations(positions),
            parts,
            self._model.heads.latent,
        )
        logits, chosen = self._model.forward(
            self._tokens[:rows], place, keep_logits=self._keeps_logits
        )
        if self._routes is not None:
            self._routes.add_answers(chosen, self._numbers[:rows], self._step)
        positions.add_(~self._finished[:rows])
        self._step.add_(1)
        self._draw(logits, rows)

    def _draw(self, logits: torch.Tensor | None, rows: int | None = None) -> None:
        rows = self._num_rows if rows is None else rows
        tokens, finished = self._tokens[:rows], self._finished[:rows]
        uniform = None
        if not self._settings.greedy:
            uniform = self._uniforms[:rows].index_select(1, self._step.view(1)).squeeze(1)
        mask = None if self._kept is None or logits is None else self._kept.mask(logits)
        drawn, logprobs = draw(logits, uniform, tokens, self._settings, self._model.groups, mask)
        tokens.copy_(drawn)
        places = self._numbers[:rows] * self._settings.max_new_tokens + self._step
        self._tokens_out.view(-1).index_copy_(0, places, drawn)
        self._logprobs_out.view(-1).index_copy_(0, places, logprobs)
        finished.logical_or_(self._ends(drawn))
        finished.logical_or_(self._limits[:rows] <= self._step + 1)

    def _keep(self, rows: int) -> None:
        """Take the kept tokens of a step: outside of it, since that waits for the device."""
        if self._kept is not None:
            self._kept.add(self._numbers[:rows])

    def _prefill(self) -> torch.Tensor | None:
        """Fill the rows' cache; the logits at their prompts' last tokens [R, V], or None before the
        last pipeline stage.
        """
        prompts, prompt_of = self._prompts.prompts, self._prompts.prompt_of
        logits, first = [], 0
        for packed in split_by_tokens(prompts, decoder.PREFILL_TOKENS):
            end = first + len(packed)
            begin_row, end_row = np.searchsorted(prompt_of, [first, end])
            of_rows = prompt_of[begin_row:end_row] - first
            output = self._prefill_pass(packed, slice(begin_row, end_row), of_rows)
            if output is not None:
                logits.append(output[self._tensor(of_rows)])
            first = end
        return torch.cat(logits) if logits else None

    def _prefill_pass(
        self, prompts: list[Prompt], rows: slice, of_rows: np.ndarray
    ) -> torch.Tensor | None:
        """Run packed prompts and fill the cache of ``rows``, whose prompts are ``of_rows``: the
        logits at the prompts' last tokens.
        """
        lengths = np.array([len(prompt.tokens) for prompt in prompts])
        ends = np.cumsum(lengths)
        placement = packed_placement(lengths.tolist(), int(ends[-1]), self._model.device)
        column = np.minimum(np.arange(lengths.max()), lengths[of_rows, None] - 1)
        place = Prefill(
            self._cache,
            placement,
            self._model.rotations(placement.positions),
            rows,
            self._tensor((ends - lengths)[of_rows, None] + column),
        )
        tokens = self._tensor(np.concatenate([prompt.tokens for prompt in prompts]))
        logits, chosen = self._model.forward(
            tokens,
            place,
            self._tensor(ends - 1),
            all_ids=self._routes is not None,
            keep_logits=self._keeps_logits,
        )
        if self._routes is not None:
            self._routes.add_prompts(chosen, lengths.tolist())
        return logits

    def _tensor(self, numbers: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(numbers, dtype=np.int64)).to(
            self._model.device
        )


class _Sorted:
    """Prompts and their rows with the longest first, so that rows side by side are of similar
    length.
    """

    def __init__(self, prompts: list[Prompt], prompt_of: list[int]) -> None:
        lengths = np.array([len(prompt.tokens) for prompt in prompts], dtype=np.int64)
        order = np.argsort(-lengths, kind="stable")
        places = np.argsort(order)  # of the prompts, in the new order
        #: of each row of the batch its prompt, in the new order
        self.prompt_of_row = places[np.asarray(prompt_of, dtype=np.int64)].tolist()
        #: the rows of the batch, in the new order
        self.rows = np.argsort(self.prompt_of_row, kind="stable").astype(np.int64)
        self.prompts = [prompts[number] for number in order]
        #: int64 [R], the prompt of each row, both in the new order
        self.prompt_of = np.array(self.prompt_of_row, dtype=np.int64)[self.rows]
