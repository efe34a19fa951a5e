"""The probe: does a server compute with the weights that the trainer has?

A server that answers "success" to a change of weights has proved nothing. So each server answers a
few fixed prompts, and the trainer computes the log-probabilities of the same tokens.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Sequence

import numpy as np
import torch

from megatron_rl.config.schema import Config
from megatron_rl.data.shared_prompts import round_up
from megatron_rl.errors import one_line
from megatron_rl.models.attention import packed_placement
from megatron_rl.models.forward import forward_stages
from megatron_rl.models.gpt.chunk import head_of
from megatron_rl.parallel.collective_try import by_first
from megatron_rl.parallel.collectives import gather_objects
from megatron_rl.parallel.groups import Groups
from megatron_rl.parallel.kept_words import KeptWords
from megatron_rl.parallel.vocab_head import head_values
from megatron_rl.records import KeptTokens, Prompt
from megatron_rl.rollout.engine import SamplingSettings
from megatron_rl.rollout.servers.answer_requests import AnswerRequests
from megatron_rl.rollout.servers.api import Answer, BadAnswer
from megatron_rl.rollout.servers.pool import ServerPool

PROMPTS, PROMPT_TOKENS, ANSWER_TOKENS = 2, 8, 12
#: Index of the first probe prompt. No data set has so many problems.
FIRST_INDEX = 1 << 40


@dataclass(frozen=True)
class ProbeResult:
    """What the servers' answers to the probe show."""

    difference: float  #: largest difference of a log-probability, over the servers that passed
    wrong: dict[str, str]  #: url -> why it did not pass


class ServerProbe:
    """Compares the servers' log-probabilities with the trainer's."""

    def __init__(
        self,
        config: Config,
        chunks: Sequence[torch.nn.Module],
        groups: Groups,
        requests: AnswerRequests,
    ) -> None:
        """
        Args:
            config: of the run.
            chunks: this rank's chunks of the model.
            groups: process groups.
            requests: makes the requests for the answers.
        """
        self._chunks, self._groups, self._requests = chunks, groups, requests
        self._tolerance = config.rollout.servers.probe_tolerance
        rollout, every = config.rollout, SamplingSettings(1, ANSWER_TOKENS, seed=5)
        self._settings = replace(every, temperature=rollout.temperature)
        if rollout.keep_sampling_mask:  # the servers' log-probabilities are over what they keep
            self._settings = replace(
                self._settings, top_p=rollout.top_p, top_k=rollout.top_k, kept=True
            )
        self._prompts = probe_prompts(config.model.vocab_size, config.model.max_sequence_length)

    def run(self, pool: ServerPool, urls: Sequence[str], version: int) -> ProbeResult:
        """Probe the servers at ``urls`` for these weights. A collective; alike on all ranks."""

        def ask() -> dict[str, list[Answer] | str]:
            with ThreadPoolExecutor(max(1, len(urls))) as threads:
                answers = threads.map(lambda url: self._ask(pool, url, version), urls)
                return dict(zip(urls, answers))

        largest, wrong = 0.0, {}
        for url, answers in by_first(self._groups.world, ask).items():
            if isinstance(answers, str):
                wrong[url] = answers
                continue
            pairs = zip(self._prompts, answers, strict=True)
            difference = float(np.max([self._difference(p, a) for p, a in pairs]))  # NaN if any is
            if difference <= self._tolerance:
                largest = max(largest, difference)
            else:
                wrong[url] = (
                    f"its log-probabilities differ from the trainer's by {difference:.3g}; "
                    f"expected at most {self._tolerance:g}"
                )
        return ProbeResult(largest, wrong)

    def _ask(self, pool: ServerPool, url: str, version: int) -> list[Answer] | str:
        """A server's answer to each prompt, or why there is none."""
        try:
            requests = [
                self._requests.of_prompt(prompt, self._settings, version)
                for prompt in self._prompts
            ]
            return [pool.ask_one(url, request)[0] for request in requests]
        except BadAnswer as error:
            return f"the probe failed: {one_line(error)}"

    def _difference(self, prompt: Prompt, answer: Answer) -> float:
        """Largest difference between the server's and the trainer's log-probability of a token. A
        collective.
        """
        tokens = np.concatenate([prompt.tokens, answer.tokens])
        expected = trainer_logprobs(
            self._chunks,
            self._groups,
            tokens,
            len(answer.tokens),
            self._settings.temperature,
            answer.kept,
        )
        return float(np.abs(answer.logprobs - expected).max())


def probe_prompts(vocab_size: int, room: int) -> list[Prompt]:
    """The fixed prompts: random tokens, the same in every run.

    Args:
        vocab_size: token ids are below it.
        room: longest prompt and answer together, tokens.
    """
    generator = np.random.default_rng(11)
    length = max(1, min(PROMPT_TOKENS, room - ANSWER_TOKENS))
    return [
        Prompt(FIRST_INDEX + i, generator.integers(0, vocab_size, length), "", {})
        for i in range(PROMPTS)
    ]


@torch.no_grad()
def trainer_logprobs(
    chunks: Sequence[torch.nn.Module],
    groups: Groups,
    tokens: np.ndarray,
    answer_length: int,
    temperature: float,
    kept: KeptTokens | None = None,
) -> np.ndarray:
    """Log-probabilities fp32 [N] of the last N tokens of a sequence. A collective over all ranks.

    Every rank runs the same sequence, together with the ranks that hold other shards of the model.

    Args:
        chunks: this rank's chunks of the model.
        groups: process groups.
        tokens: int64 [P + N], the sequence.
        answer_length: N.
        temperature: divides the logits.
        kept: N sets, which the log-probabilities are over; None: the whole vocabulary.
    """
    device = next(chunks[0].parameters()).device
    count = round_up(len(tokens), groups.tensor.size())
    row = torch.zeros(count, dtype=torch.int64, device=device)
    row[: len(tokens)] = torch.from_numpy(np.asarray(tokens)).to(device)
    training = [chunk.training for chunk in chunks]
    for chunk in chunks:
        chunk.eval()
    placement = packed_placement([len(tokens)], count, device)
    hidden = forward_stages(chunks, row, placement, groups, to_hidden=True)
    for chunk, before in zip(chunks, training):
        chunk.train(before)
    found = None
    if hidden is not None:
        head = head_of(chunks[-1])
        answer = slice(len(tokens) - answer_length - 1, len(tokens) - 1)
        words = None if kept is None else KeptWords.of(kept, device)
        rows, targets = head.gather(hidden)[answer], row.roll(-1)[answer]
        values = head_values(rows, head, targets, temperature, kept=words)
        found = values.logprobs.float().cpu().numpy()
    stages = gather_objects(found, groups.pipeline)
    return next(values for values in stages if values is not None)
