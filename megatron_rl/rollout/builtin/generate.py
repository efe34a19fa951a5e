"""The built-in engine: the training model generates by itself, with the weights it has.

Answers are generated in waves of rows. A wave prefills its prompts, packed into rows of unequal
sequences, each once; gives every answer its copy of the prompt's cache; and then decodes one token
a row and step. Rows that have finished leave the batch from time to time.
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
from megatron_rl.rollout.builtin.kv_cache import KVCache, PrefillPlacement, decode_placement
from megatron_rl.rollout.builtin.lockstep import Lockstep
from megatron_rl.rollout.builtin.routes import RouteLog
from megatron_rl.rollout.builtin.sampler import sample, uniforms
from megatron_rl.rollout.builtin.waves import Wave, split_by_tokens, split_into_waves
from megatron_rl.rollout.engine import EngineParts, SamplingSettings, WholeAnswers
from megatron_rl.router.capture import RouterCapture

#: Most tokens of one prefill pass, unless a single prompt is longer.
PREFILL_TOKENS = 4096
#: Tokens of a wave between two looks at whether the run is to stop.
LOOK_EVERY = 8
#: Finished rows leave the batch as soon as no more than this share of it is still generating.
COMPACT_BELOW = 0.8


@dataclass
class _Rows:
    """State of the R rows in the batch, on the device."""

    numbers: torch.Tensor  #: int64 [R], row of the wave
    positions: torch.Tensor  #: int64 [R], where the next token goes
    limits: torch.Tensor  #: int64 [R], most tokens of the answer
    uniforms: torch.Tensor  #: float64 [R, max_new_tokens]
    finished: torch.Tensor  #: bool [R]
    longest: int  #: at least the largest of ``positions``

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
    """Of a run."""
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
    """`Engine` on the training model (bare chunks) of this rank. It has no other weights
    than the model's, and its completions name no version of them.
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
            stop_ids: the tokens that end an answer, the first of them that is drawn.
            max_batch: answers decoded at a time on this rank.
            decode: token ids to text, without special tokens.
            max_sequence_length: longest prompt and answer together; answers are cut there.
            capture: of the chunks' routers; needed for completions that carry their experts.
            stop: whether this rank has heard that the run is to stop; None: it never does.
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
        self._lockstep = Lockstep(groups, transformer_config, self._device)

    @torch.no_grad()
    def generate(self, prompts: Sequence[Prompt], settings: SamplingSettings) -> list[RolloutGroup]:
        """One group for each prompt, in the order given; see `Engine`.

        Context-parallel ranks have the same prompts and all dense weights: each generates for its
        share of them, with whole sequences, and they exchange the answers.

        Raises:
            UserError: a prompt leaves no room for an answer.
            ValueError: experts are asked for, and the engine has no capture.
            Stopped: a rank has heard that the run is to stop; on all ranks.
        """
        self._check(prompts)
        if settings.routes and self._capture is None:
            raise ValueError("settings.routes needs an engine with a RouterCapture")
        context = self._groups.context
        given_up = False
        try:
            mine = self._generate(prompts[context.rank() :: context.size()], settings)
        except Stopped:  # of the ranks that generate in step with this one
            given_up = True
        if self._stop is not None and all_max(int(given_up), self._groups.world, self._device):
            raise Stopped
        shares = gather_objects(mine, context)
        return [shares[i % context.size()][i // context.size()] for i in range(len(prompts))]

    def _generate(
        self, prompts: Sequence[Prompt], settings: SamplingSettings
    ) -> list[RolloutGroup]:
        waves = split_into_waves(prompts, settings.samples, self._max_batch)
        completions: list[Completion] = []
        with _evaluation_mode(self._chunks):
            for number in range(self._lockstep.most(len(waves))):
                wave = waves[number] if number < len(waves) else Wave([], [], [])
                completions += self._run(wave, settings)
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

    def _run(self, wave: Wave, settings: SamplingSettings) -> list[Completion]:
        """Generate a wave; an empty one only keeps step with other ranks."""
        rows = self._first_rows(wave, settings)
        prompt_of = self._tensor(wave.prompt_of)
        shape = (len(wave.prompt_of), settings.max_new_tokens)
        log = None
        if settings.routes:
            assert self._capture is not None, "given where answers carry their experts"
            log = RouteLog(self._chunks, self._groups, self._capture, shape)
        cache, logits = self._prefill(wave.prompts, log)
        cache = cache.select(prompt_of)
        logits = None if logits is None else logits[prompt_of]
        tokens_out = torch.zeros(shape, dtype=torch.int64, device=self._device)
        logprobs_out = torch.zeros(shape, dtype=torch.float32, device=self._device)
        for step in range(settings.max_new_tokens):
            if self._stop is not None and step % LOOK_EVERY == 0:
                if self._lockstep.any(self._stop()):
                    raise Stopped
            tokens, logprobs = self._sample(logits, rows, step, settings)
            tokens_out[rows.numbers, step] = tokens
            logprobs_out[rows.numbers, step] = logprobs
            stopped = (tokens[:, None] == self._stop_ids).any(dim=1)
            rows.finished |= stopped | (rows.limits <= step + 1)
            here, anywhere = self._lockstep.count(~rows.finished)
            if not anywhere:
                break
            if here <= COMPACT_BELOW * len(tokens):
                keep = (~rows.finished).nonzero().squeeze(1)
                rows, cache, tokens = rows.select(keep), cache.select(keep), tokens[keep]
            logits = self._decode(tokens, rows, cache, step, log)
            rows.positions = rows.positions + 1
            rows.longest += 1
        return self._completions(wave, settings, tokens_out, logprobs_out, log)

    def _first_rows(self, wave: Wave, settings: SamplingSettings) -> _Rows:
        lengths = np.array([len(prompt.tokens) for prompt in wave.prompts], dtype=np.int64)
        lengths = lengths[wave.prompt_of]
        limits = np.minimum(settings.max_new_tokens, self._max_sequence_length - lengths)
        names = [
            (wave.prompts[p].index, wave.prompts[p].first_sample(settings.samples) + number)
            for p, number in zip(wave.prompt_of, wave.sample_numbers)
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
        """Cache of the prompts, one row each, and the logits at their last tokens, [P, V / tp].

        The logits are None before the last pipeline stage.
        """
        cache = KVCache(len(prompts), max((len(p.tokens) for p in prompts), default=0) + 1)
        batches = split_by_tokens(prompts, PREFILL_TOKENS)
        logits, first = [], 0
        for number in range(self._lockstep.most(len(batches))):
            batch = batches[number] if number < len(batches) else []
            lengths = [len(prompt.tokens) for prompt in batch]
            num_tokens = self._lockstep.row_tokens(sum(lengths))
            row = np.zeros(num_tokens, dtype=np.int64)
            if batch:
                row[: sum(lengths)] = np.concatenate([prompt.tokens for prompt in batch])
            cache_rows = np.repeat(np.arange(first, first + len(batch)), lengths)
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
            first += len(batch)
        return cache, torch.cat(logits) if logits else None

    def _decode(
        self, tokens: torch.Tensor, rows: _Rows, cache: KVCache, step: int, log: RouteLog | None
    ) -> torch.Tensor | None:
        """One token further: logits [R, V / tp] on the last pipeline stage."""
        num_tokens = self._lockstep.row_tokens(len(tokens))
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
        """Next tokens int64 [R] and log-probabilities fp32 [R], alike on all ranks of a replica."""
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
        wave: Wave,
        settings: SamplingSettings,
        tokens_out: torch.Tensor,
        logprobs_out: torch.Tensor,
        log: RouteLog | None,
    ) -> list[Completion]:
        tokens, logprobs = tokens_out.cpu().numpy(), logprobs_out.cpu().numpy()
        stopped = np.isin(tokens, self._stop_ids.cpu().numpy())
        completions = []
        for row, p in enumerate(wave.prompt_of):
            room = self._max_sequence_length - len(wave.prompts[p].tokens)
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
        routes = log.take(wave.prompt_of, [len(answer.tokens) for answer in completions])
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
