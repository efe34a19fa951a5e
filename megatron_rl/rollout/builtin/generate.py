"""The built-in engine: the training model itself generates, with the weights it has.

Answers are generated in batches, one row for each answer. A batch first prefills its prompts, each
once and packed together. Then each step decodes one token for each row. Finished rows leave the
batch from time to time. A `decoder.Decoder` does all this: the plain functions where they know the
model and its layout, Megatron's modules otherwise.
"""

from __future__ import annotations

import contextlib
from dataclasses import replace
from typing import Callable, Collection, Iterator, Sequence

import numpy as np
import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_rl.device.memory import spare_bytes
from megatron_rl.errors import Stopped, UserError
from megatron_rl.parallel.collectives import all_max, gather_objects
from megatron_rl.parallel.groups import Groups
from megatron_rl.records import Completion, Prompt, RolloutGroup
from megatron_rl.rollout.builtin.batches import Batch, split_into_batches
from megatron_rl.rollout.builtin.decoder import BatchPlan, Decoder
from megatron_rl.rollout.builtin.kept import KeptLog, log_of, shared_sets
from megatron_rl.rollout.builtin.modules import ModuleDecoder
from megatron_rl.rollout.builtin.plain.buckets import Buckets
from megatron_rl.rollout.builtin.plain.forward import PlainModel
from megatron_rl.rollout.builtin.plain.graphs import CapturedSteps, Steps
from megatron_rl.rollout.builtin.plain.model import plain_model
from megatron_rl.rollout.builtin.plain.plan import (
    Plan,
    plan_of,
    unknown_module,
    unknown_weight,
)
from megatron_rl.rollout.builtin.plain.rounding import Rounding
from megatron_rl.rollout.builtin.plain.shares import Shares, shares_of
from megatron_rl.rollout.builtin.plain.step import PlainDecoder
from megatron_rl.rollout.builtin.rank_sync import RankSync
from megatron_rl.rollout.builtin.routes import RouteLog, Routes
from megatron_rl.rollout.engine import EngineParts, SamplingSettings, WholeAnswers
from megatron_rl.router.capture import RouterCapture

#: Steps between two looks at whether the run is to stop, and on CUDA at whether rows have finished.
LOOK_EVERY = 8


def builtin_engine(parts: EngineParts) -> BuiltinEngine:
    """The engine ``builtin`` of a run. A collective."""
    found = unknown_module(parts.chunks) or unknown_weight(parts.chunks)
    if found is not None:  # the run summary knows the options only
        parts.warn(f"answers are decoded through Megatron's modules: {found}")
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
        rounding=parts.config.rollout.round_weights,
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
        plan: Plan | None = None,
        rounding: Rounding = "none",
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
            plan: how to decode; None: as `plan_of` says, which then is a collective of all ranks.
            rounding: of the weights that decode, in copies made for each call of `generate`.

        Raises:
            UserError: ``rounding`` where Megatron's modules decode; on all ranks.
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
        self.plan = plan or plan_of(transformer_config, groups, self._device, spare_bytes(), chunks)
        self._rounding = rounding
        if rounding != "none" and not self.plan.is_plain:
            raise UserError(
                f"rollout.round_weights is {rounding}, and answers are decoded "
                f"{self.plan.text()}; expected decoding by plain functions, which have copies of "
                "the weights; set rollout.round_weights none"
            )
        self._config = transformer_config
        alone = self.plan.is_plain  # ranks that share experts do not meet while they decode
        self._ranks = RankSync(groups, transformer_config, self._device, alone=alone)

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
            model = None
            if self.plan.is_plain:
                longest = self._max_sequence_length
                model = plain_model(self._chunks, self._groups, self.plan, longest, self._rounding)
            for number in range(self._ranks.most(len(batches))):
                batch = batches[number] if number < len(batches) else Batch([], [], [])
                completions += self._run(batch, settings, model)
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

    def _run(
        self, batch: Batch, settings: SamplingSettings, model: PlainModel | None
    ) -> list[Completion]:
        """Generate a batch. An empty batch only takes part in the other ranks' collectives."""
        plan = BatchPlan.of(batch, settings, self._max_sequence_length, self._stop_ids)
        kept = log_of(self._groups) if settings.keeps else None
        decoder = self._decoder(plan, model, kept)
        # On CUDA the host runs ahead of the device, and waits for it to count.
        count_every = LOOK_EVERY if model is not None and self._device.type == "cuda" else 1
        self._look(0)
        decoder.begin()
        for step in range(1, settings.max_new_tokens):
            if step % count_every == 0:
                here, anywhere = decoder.unfinished()
                if not anywhere:
                    break
                decoder.compact(here)
            self._decode(decoder)
            self._look(step)
        return self._completions(plan, decoder, kept)

    def _decode(self, decoder: Decoder) -> None:
        """One step."""
        decoder.advance()

    def _look(self, step: int) -> None:
        if self._stop is not None and step % LOOK_EVERY == 0 and self._ranks.any(self._stop()):
            raise Stopped

    def _decoder(self, plan: BatchPlan, model: PlainModel | None, kept: KeptLog | None) -> Decoder:
        if model is None:
            log, routes = None, self._routes(plan)
            if routes is not None and self._capture is not None:
                log = RouteLog(self._chunks, self._groups, self._capture, routes)
            return ModuleDecoder(self._chunks, self._groups, self._ranks, plan, log, kept)
        # Threads cannot take part in collectives each on its own, nor share a record of steps.
        if self._device.type == "cpu" and self._alone and kept is None:
            threads = torch.get_num_threads()
            shares = shares_of(plan.batch.prompt_of, plan.lengths, threads)
            if len(shares) > 1:
                own = [self._plain(plan.select(rows), model, None) for rows in shares]
                return Shares(own, shares)
        return self._plain(plan, model, kept)

    @property
    def _alone(self) -> bool:
        return self._groups.model.size() == 1

    def _plain(self, plan: BatchPlan, model: PlainModel, kept: KeptLog | None) -> Decoder:
        on_cuda = self._device.type == "cuda"
        captured = on_cuda and self._alone
        buckets = Buckets(captured, tight=not on_cuda)  # only a CPU's caches mind gaps
        steps = CapturedSteps() if captured else Steps()
        routes = self._routes(plan, logprobs=plan.settings.router_logprobs)
        return PlainDecoder(model, plan, routes, buckets, steps, kept)

    def _routes(self, plan: BatchPlan, *, logprobs: bool = False) -> Routes | None:
        """What keeps the experts, and their log-probabilities; None: they are not wanted."""
        if not plan.settings.routes:
            return None
        capture, config = self._capture, self._config
        assert capture is not None, "generate has checked it"
        count = 0  # of log-probabilities
        if logprobs:
            chosen, every = config.moe_router_topk, config.num_moe_experts or 0
            count = every if capture.every_expert else chosen
        shape = (len(plan.lengths), plan.settings.max_new_tokens)
        return Routes(capture.layers_of(), config, shape, self._device, count)

    def _completions(
        self, plan: BatchPlan, decoder: Decoder, kept: KeptLog | None
    ) -> list[Completion]:
        tokens, logprobs = decoder.tokens_out.cpu().numpy(), decoder.logprobs_out.cpu().numpy()
        stopped = np.isin(tokens, self._stop_ids.cpu().numpy())
        completions = []
        for row, limit in enumerate(plan.limits.tolist()):
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
        lengths = [len(answer.tokens) for answer in completions]
        sets = shared_sets(kept, lengths, self._groups) if plan.settings.keeps else None
        if sets is not None:
            pairs = zip(completions, sets, strict=True)
            completions = [replace(answer, kept=each) for answer, each in pairs]
        if not plan.settings.routes:
            return completions
        routes = decoder.routes(lengths)
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
