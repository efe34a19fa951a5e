"""The records that travel between the stages of a step. Small, frozen, made of NumPy arrays; no
torch, no Megatron.

    Prompt -> RolloutGroup -> Sample -> Pack -> (scored, trained)

Legend of shapes: T tokens of a pack, S sequences of a pack, M tokens of one sequence, P of them its
prompt, N tokens of one completion, G completions of a prompt.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Mapping

import numpy as np


@dataclass(frozen=True)
class Prompt:
    """One problem: its place in the data set, its token ids and the JSON object it came from."""

    #: line of the data set, from 0; names the prompt in samples.jsonl and seeds its sampling
    index: int
    #: int64 [P], with the beginning-of-sequence token where the tokenizer has one
    tokens: np.ndarray
    text: str  #: what the model sees of it: of a chat with the control tokens of the template
    record: Mapping[str, Any]  #: what the verifier needs (numbers and target, answer, tests...)
    #: how often its step has drawn the same problem before; see `first_sample`
    occurrence: int = 0

    def first_sample(self, samples: int) -> int:
        """The number of the first of its answers, where every occurrence gets this many.

        A problem that a step draws three times has the random numbers of one with three times as
        many answers, so that no answer is drawn twice.
        """
        return self.occurrence * samples


@dataclass(frozen=True)
class RoutedExperts:
    """The experts that MoE routers chose for the tokens of a sequence, or of a pack.

    Of a sampled sequence there are P + N - 1: the last token was never fed to the model (vLLM and
    SGLang return as many). A pipeline stage of the built-in engine knows its own layers only, which
    are all it needs; other engines give all of them. Tokens that no sampler has seen, such as
    spliced text, are not ``known``; neither are those of a sequence behind the last of ``ids``.
    """

    ids: np.ndarray  #: uint8, int16 or int32 [tokens, L', K], global expert ids, different in a row
    layers: tuple[int, ...]  #: L' global numbers (from 1) of MoE layers, ascending
    #: bool [tokens]; the ids of other tokens mean nothing; None: all are known
    known: np.ndarray | None = None


@dataclass(frozen=True)
class Completion:
    """What follows a prompt: one sampled answer, or several turns with an environment's tokens
    between them.
    """

    tokens: np.ndarray  #: int64 [N], N >= 1, with the stop token when ``finished``
    #: float32 [N], log-probability of each written token under the sampler at its temperature
    logprobs: np.ndarray
    finished: bool  #: True: it ended with a stop token; False: cut at the length limit
    text: str  #: decoded, without special tokens and the stop token
    #: of prompt and completion, P + N - 1 tokens; None: the engine was not asked, or cannot tell
    routed_experts: RoutedExperts | None = None
    #: of the weights that made it: how often they had changed by then in this process
    version: int | None = None
    #: of the weights that sampled its last token, where they changed meanwhile
    last_version: int | None = None
    #: bool [N], the tokens that the policy wrote; the others' ``logprobs`` mean nothing; None: all
    written: np.ndarray | None = None
    #: of several turns, what the policy wrote in the last; None: there is one, see ``text``
    last_text: str | None = None

    @property
    def judged_text(self) -> str:
        """What a verifier judges: the last turn."""
        return self.text if self.last_text is None else self.last_text

    @property
    def num_written(self) -> int:
        """How many of its tokens the policy wrote."""
        return len(self.tokens) if self.written is None else int(self.written.sum())

    @property
    def longest_turn(self) -> int:
        """Most tokens that the policy wrote one behind the other."""
        if self.written is None:
            return len(self.tokens)
        changes = np.flatnonzero(np.diff(self.written.astype(np.int8), prepend=0, append=0))
        return int((changes[1::2] - changes[::2]).max(initial=0))

    @property
    def written_logprobs(self) -> np.ndarray:
        """Log-probabilities of the tokens that the policy wrote, float32 [num_written]."""
        return self.logprobs if self.written is None else self.logprobs[self.written]


@dataclass(frozen=True)
class RolloutGroup:
    """A prompt with its G completions: the unit in which advantages are normalised. Never split
    over ranks.
    """

    prompt: Prompt
    completions: tuple[Completion, ...]


@dataclass(frozen=True)
class Sample:
    """One sequence to train on, with what the loss needs to know of it.

    The tokens that the policy wrote may stand anywhere: behind a prompt, in several turns with an
    environment's text between them, nowhere. A policy's token at place 0 is not trained on, since
    no token stands before it to predict it.

    Supervised fine-tuning makes the same record with ``advantage`` 1 and ``rollout_logprobs`` None.
    """

    tokens: np.ndarray  #: int64 [M], M >= 1
    written: np.ndarray  #: bool [M], the tokens that the policy wrote
    advantage: float = 1.0
    #: float32 [M], log-probability of each written token under the sampler; of others not read
    rollout_logprobs: np.ndarray | None = None
    routed_experts: RoutedExperts | None = None  #: the sampler's, of the first tokens, at most M

    @classmethod
    def of(
        cls,
        prompt: np.ndarray,
        answer: np.ndarray,
        advantage: float = 1.0,
        logprobs: np.ndarray | None = None,
        routed_experts: RoutedExperts | None = None,
        *,
        written: np.ndarray | None = None,
    ) -> Sample:
        """A prompt (int64 [P]) and what follows it (int64 [N]), with the sampler's ``logprobs``
        (float32 [N]); ``written``: bool [N], None: the policy wrote all of it.
        """
        wrote = np.ones(len(answer), dtype=bool) if written is None else written
        if logprobs is not None:
            unknown = np.full(len(prompt), np.nan, dtype=np.float32)
            logprobs = np.concatenate([unknown, logprobs]).astype(np.float32)
        return cls(
            np.concatenate([prompt, answer]).astype(np.int64),
            np.concatenate([np.zeros(len(prompt), dtype=bool), wrote]),
            advantage,
            logprobs,
            routed_experts,
        )

    @property
    def trained(self) -> np.ndarray:
        """bool [M - 1]: whether the token at place t + 1, which place t predicts, is trained on."""
        return self.written[1:]


@dataclass(frozen=True)
class Pack:
    """Several sequences laid one behind the other in a row of T tokens: one micro-batch.

    Position t predicts ``targets[t]``, the next token of the same sequence; ``mask[t]`` is True
    where the policy wrote that target. The row ends with padding; behind a sequence there is
    padding too, up to a multiple of ``sequence_multiple`` tokens. Padding belongs to no sequence.
    An empty pack (no sequence, all padding) is legal: it keeps the number of packs equal on every
    rank.
    """

    tokens: np.ndarray  #: int64 [T]
    targets: np.ndarray  #: int64 [T]; 0 where there is none
    positions: np.ndarray  #: int64 [T], position within the sequence, from 0
    mask: np.ndarray  #: bool [T]
    sequence_ids: np.ndarray  #: int64 [T], 0..S-1 in order; S on padding, between them too
    lengths: tuple[int, ...]  #: S lengths, in order, without padding
    advantages: np.ndarray  #: float32 [T], the sequence's advantage at every position; 0 on padding
    rollout_logprobs: np.ndarray | None = None  #: float32 [T], 0 outside the mask
    sequence_multiple: int = 1  #: sequences begin at multiples of it
    routed_experts: RoutedExperts | None = None  #: the sampler's, of T tokens; see `data.packing`

    @property
    def num_tokens(self) -> int:
        """T, padding included."""
        return len(self.tokens)

    @property
    def num_sequences(self) -> int:
        """S."""
        return len(self.lengths)
