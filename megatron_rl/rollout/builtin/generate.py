"""The built-in engine: the training model itself generates, with the weights it has.

Answers are generated in batches, one row for each answer. A batch first prefills its prompts, each
once and packed together. Then every row gets a copy of its prompt's cache. Then each step decodes
one token for each row. Finished rows leave the batch from time to time.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace
from typing import Callable, Collection, Iterator, Sequence

import numpy as np
import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_rl.errors import Stopped, UserError
from megatron_rl.models.attention import packed_placement
from megatron_rl.models.forward import forward_stages
from megatron_rl.parallel.collectives import all_max, broadcast, gather_first_dim, gather_objects
from megatron_rl.parallel.groups import Groups
from megatron_rl.records import Completion, Prompt, RolloutGroup
from megatron_rl.rollout.builtin.batches import Batch, split_by_tokens, split_into_batches
from megatron_rl.rollout.builtin.kv_cache import KVCache, PrefillPlacement, decode_placement
from megatron_rl.rollout.builtin.rank_sync import RankSync
from megatron_rl.rollout.builtin.routes import RouteLog
from megatron_rl.rollout.builtin.sampler import sample, uniforms
from megatron_rl.rollout.engine import EngineParts, SamplingSettings, WholeAnswers
from megatron_rl.router.capture import RouterCapture

#: Most tokens of one prefill pass, unless a single prompt is longer.
PREFILL_TOKENS = 4096
#: Steps between two looks at whether the run is to stop.
LOOK_EVERY = 8
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
    longest: int  #: an upper bound of ``positions``, known without asking the device

    def select(self, rows: torch.Tensor) -> _Rows:
        return _Rows(
            self.numbers[rows],
            self.positions[rows],
            self.limits[rows],
            self.uniforms[rows],
            self.finished[rows],
            self.longest,
        )


def builtin_engine(parts: EngineParts) -> BuiltinEngine:
    """The engine ``builtin`` of a run."""
    return BuiltinEngine(
        parts.chunks,
        parts.groups,
        parts.chunks[0].config,
        parts.stop_ids,
        parts.config.rollout.max_batch,
        parts.decode,
        parts.config.model.max_sequence_length,
        parts.capture,
        parts.stop,
    )


class BuiltinEngine(WholeAnswers):
    """`Engine` on this rank's training model. It has no weights of its own, so its completions name
    no version.
    """

    def __init__(
        self,
        chunks: Sequence[torch.nn.Module],
        groups: Groups,
        transformer_config: TransformerConfig,
        stop_ids: Collection[int],
        max_batch: int,
        decode: Callable[[Sequence[int]], str],
        max_sequence_length: int,
        capture: RouterCapture | None = None,
        stop: Callable[[], bool] | None = None,
    ) -> None:
        """
        Args:
            chunks: this rank's chunks of the model.
            groups: process groups.
            transformer_config: of the chunks.
            stop_ids: the tokens that end an answer.
            max_batch: most answers decoded at a time on this rank.
            decode: token ids to text, without special tokens.
            max_sequence_length: longest prompt and answer together, tokens; answers are cut there.
            capture: of the chunks' routers; needed if completions are to carry their experts.
            stop: whether this rank has heard that the run is to stop; None: it is never asked.
        """
        self._chunks = chunks
        self._groups = groups
        self._max_batch = max_batch
        self._decode_text = decode
        self._max_sequence_length = max_sequence_length
        self._device = next(chunks[0].parameters()).device
        self._stop_ids = self._tensor(sorted(stop_ids))
        self._capture = capture
        self._stop = stop
        self._ranks = RankSync(groups, transformer_config, self._device)

    @torch.no_grad()
    def generate(self, prompts: Sequence[Prompt], settings: SamplingSettings) -> list[RolloutGroup]:
        """See `Engine`.

        Context-parallel ranks have the same prompts and all dense weights. So each generates whole
        sequences for its share of the prompts, and they exchange the answers.

        Raises:
            UserError: a prompt leaves no room for an answer.
            ValueError: ``settings.routes`` without a capture.
            Stopped: a rank has heard that the run is to stop; on all ranks.
        """
        self._check(prompts)
        if settings.routes and self._capture is None:
            raise ValueError("settings.routes needs an engine with a RouterCapture")
        context = self._groups.context
        stopped = False
        try:
            mine = self._generate(prompts[context.rank() :: context.size()], settings)
        except Stopped:  # on the ranks that this one generates with, perhaps not on all
            stopped = True
        if self._stop is not None and all_max(int(stopped), self._groups.world, self._device):
            raise Stopped
        shares = gather_objects(mine, context)
        return [shares[i % context.size()][i // context.size()] for i in range(len(prompts))]

    def _generate(
        self, prompts: Sequence[Prompt], settings: SamplingSettings
    ) -> list[RolloutGroup]:
        batches = split_into_batches(prompts, settings.samples, self._max_batch)
        completions: list[Completion] = []
        with _evaluation_mode(self._chunks):
            for number in range(self._ranks.most(len(batches))):
                batch = batches[number] if number < len(batches) else Batch([], [], [])
                completions += self._run(batch, settings)
        answers = iter(completions)
        return [
            RolloutGroup(prompt, tuple(next(answers) for _ in range(settings.samples)))
            for prompt in prompts
        ]

    def _check(self, prompts: Sequence[Prompt]) -> None:
        for prompt in prompts:
            if not 0 < len(prompt.tokens) < self._max_sequence_length:
                raise UserError(
                    f"prompt {prompt.index} has {len(prompt.tokens)} tokens; with "
                    f"model.max_sequence_length {self._max_sequence_length} a prompt may have "
                    f"1 to {self._max_sequence_length - 1}; "
                    "drop the prompt or raise model.max_sequence_length"
                )

    def _run(self, batch: Batch, settings: SamplingSettings) -> list[Completion]:
        """Generate a batch. An empty batch only takes part in the other ranks' collectives."""
        rows = self._first_rows(batch, settings)
        prompt_of = self._tensor(batch.prompt_of)
        shape = (len(batch.prompt_of), settings.max_new_tokens)
        log = None
        if settings.routes:
            assert self._capture is not None, "generate has checked it"
            log = RouteLog(self._chunks, self._groups, self._capture, shape)
        cache, logits = self._prefill(batch.prompts, log)
        cache = cache.select(prompt_of)
        logits = None if logits is None else logits[prompt_of]
        tokens_out = torch.zeros(shape, dtype=torch.int64, device=self._device)
        logprobs_out = torch.zeros(shape, dtype=torch.float32, device=self._device)
        for step in range(settings.max_new_tokens):
            if self._stop is not None and step % LOOK_EVERY == 0:
                if self._ranks.any(self._stop()):
                    raise Stopped
            tokens, logprobs = self._sample(logits, rows, step, settings)
            tokens_out[rows.numbers, step] = tokens
            logprobs_out[rows.numbers, step] = logprobs
            stopped = (tokens[:, None] == self._stop_ids).any(dim=1)
            rows.finished |= stopped | (rows.limits <= step + 1)
            here, anywhere = self._ranks.count(~rows.finished)
            if not anywhere:
                break
            if here <= COMPACT_BELOW * len(tokens):
                keep = (~rows.finished).nonzero().squeeze(1)
                rows, cache, tokens = rows.select(keep), cache.select(keep), tokens[keep]
            logits = self._decode(tokens, rows, cache, step, log)
            rows.positions = rows.positions + 1
            rows.longest += 1
        return self._completions(batch, settings, tokens_out, logprobs_out, log)

    def _first_rows(self, batch: Batch, settings: SamplingSettings) -> _Rows:
        lengths = np.array([len(prompt.tokens) for prompt in batch.prompts], dtype=np.int64)
        lengths = lengths[batch.prompt_of]
        limits = np.minimum(settings.max_new_tokens, self._max_sequence_length - lengths)
        names = [
            (batch.prompts[p].index, batch.prompts[p].first_sample(settings.samples) + number)
            for p, number in zip(batch.prompt_of, batch.sample_numbers)
        ]
        count = 0 if settings.greedy else settings.max_new_tokens
        return _Rows(
            numbers=torch.arange(len(lengths), device=self._device),
            positions=self._tensor(lengths),
            limits=self._tensor(limits),
            uniforms=torch.from_numpy(uniforms(settings.seed, names, count)).to(self._device),
            finished=torch.zeros(len(lengths), dtype=torch.bool, device=self._device),
            longest=int(lengths.max(initial=0)),
        )

    def _prefill(
        self, prompts: list[Prompt], log: RouteLog | None
    ) -> tuple[KVCache, torch.Tensor | None]:
        """The cache of the prompts, one row each, and the logits at their last tokens [P, V / tp],
        or None before the last pipeline stage.
        """
        cache = KVCache(len(prompts), max((len(p.tokens) for p in prompts), default=0) + 1)
        passes = split_by_tokens(prompts, PREFILL_TOKENS)
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
            if log is None:
                output = forward_stages(self._chunks, tokens, placement, self._groups)
            else:
                output = log.prefill(tokens, placement, lengths)
            if output is not None:
                logits.append(output[self._tensor(np.cumsum(lengths) - 1)])
            first += len(packed)
        return cache, torch.cat(logits) if logits else None

    def _decode(
        self, tokens: torch.Tensor, rows: _Rows, cache: KVCache, step: int, log: RouteLog | None
    ) -> torch.Tensor | None:
        """Feed one token of each row: the logits [R, V / tp], or None before the last stage."""
        num_tokens = self._ranks.row_tokens(len(tokens))
        placement = decode_placement(cache, rows.positions, rows.longest, num_tokens)
        padded = torch.cat([tokens, tokens.new_zeros(num_tokens - len(tokens))])
        if log is None:
            logits = forward_stages(self._chunks, padded, placement, self._groups)
        else:
            logits = log.decode(padded, placement, rows.numbers, step)
        return None if logits is None else logits[: len(tokens)]

    def _sample(
        self, logits: torch.Tensor | None, rows: _Rows, step: int, settings: SamplingSettings
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Next tokens int64 [R] and log-probabilities fp32 [R], the same on all ranks of a
        replica.
        """
        groups = self._groups
        num_rows = len(rows.numbers)
        drawn = torch.zeros(2, num_rows, dtype=torch.float64, device=self._device)
        if num_rows and groups.is_last_stage:
            assert logits is not None, "on the last stage"
            whole = gather_first_dim(logits.T, groups.tensor).T
            uniform = None if settings.greedy else rows.uniforms[:, step]
            drawn = torch.stack([part.double() for part in sample(whole, uniform, settings)])
            broadcast(drawn, groups.tensor)
        if num_rows:
            broadcast(drawn, groups.pipeline, groups.pipeline.size() - 1)
        tokens, logprobs = drawn
        return tokens.long(), logprobs.float()

    def _completions(
        self,
        batch: Batch,
        settings: SamplingSettings,
        tokens_out: torch.Tensor,
        logprobs_out: torch.Tensor,
        log: RouteLog | None,
    ) -> list[Completion]:
        tokens, logprobs = tokens_out.cpu().numpy(), logprobs_out.cpu().numpy()
        stopped = np.isin(tokens, self._stop_ids.cpu().numpy())
        completions = []
        for row, p in enumerate(batch.prompt_of):
            room = self._max_sequence_length - len(batch.prompts[p].tokens)
            limit = min(settings.max_new_tokens, room)
            ends = np.flatnonzero(stopped[row, :limit])
            length = int(ends[0]) + 1 if len(ends) else limit
            ids = tokens[row, :length].copy()
            completions.append(
                Completion(
                    tokens=ids,
                    logprobs=logprobs[row, :length].copy(),
                    finished=len(ends) > 0,
                    text=self._decode_text(ids[: length - (len(ends) > 0)].tolist()),
                )
            )
        if log is None:
            return completions
        routes = log.take(batch.prompt_of, [len(answer.tokens) for answer in completions])
        return [
            replace(answer, routed_experts=routed)
            for answer, routed in zip(completions, routes, strict=True)
        ]

    def _tensor(self, numbers: Sequence[int] | np.ndarray) -> torch.Tensor:
        return torch.as_tensor(np.asarray(numbers, dtype=np.int64)).to(self._device)


@contextlib.contextmanager
def _evaluation_mode(chunks: Sequence[torch.nn.Module]) -> Iterator[None]:
    modes = [chunk.training for chunk in chunks]
    for chunk in chunks:
        chunk.eval()
    try:
        yield
    finally:
        for chunk, mode in zip(chunks, modes):
            chunk.train(mode)
