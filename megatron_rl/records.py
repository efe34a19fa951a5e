"""The records that travel between the stages of a step. Small, frozen, made of NumPy arrays; no
torch, no Megatron.

    Prompt -> RolloutGroup -> Sample -> Pack -> (scored, trained)

Legend of shapes: T tokens of a pack, S sequences of a pack, M tokens of one sequence, P of them its
prompt, N tokens of one completion, G completions of a prompt, R rows that the model runs on for a
pack.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Mapping, Sequence

import numpy as np


@dataclass(frozen=True)
class Prompt:
    """One problem: its index in the data set, its token ids and its JSON object."""

    #: line of the data set, from 0; names the prompt in samples.jsonl and seeds its sampling
    index: int
    #: int64 [P], with the beginning-of-sequence token where the tokenizer has one
    tokens: np.ndarray
    text: str  #: text as the model sees it; for a chat with the template's control tokens
    record: Mapping[str, Any]  #: what the verifier needs (numbers and target, answer, tests...)
    #: earlier draws of the same problem in its step; see `first_sample`
    occurrence: int = 0

    def first_sample(self, samples: int) -> int:
        """The number of its first answer, if every occurrence gets this many.

        A problem that a step draws three times has the random numbers of one with three times as
        many answers, so no answer is sampled twice.
        """
        return self.occurrence * samples


@dataclass(frozen=True)
class RoutedExperts:
    """The experts that MoE routers chose for the tokens of a sequence or a pack.

    A sampled sequence has P + N - 1 tokens with experts: the last token was never fed to the model
    (vLLM and SGLang return the same number). A pipeline stage of the built-in engine knows only its
    own layers, which is all it needs; other engines give all layers. Tokens that no sampler has
    seen, such as spliced text, are not ``known``, nor are tokens of a sequence after the last of
    ``ids``.
    """

    ids: np.ndarray  #: uint8, int16 or int32 [tokens, L', K], global expert ids, different in a row
    layers: tuple[int, ...]  #: L' global numbers (from 1) of MoE layers, ascending
    #: bool [tokens]; ids of unknown tokens have no meaning; None: all are known
    known: np.ndarray | None = None
    #: float32 [tokens, L', N], log r of the N experts that the run's `DistanceRule` compares: of
    #: ``ids``, ascending, or of all; None: the sampler did not give them
    logprobs: np.ndarray | None = None


@dataclass(frozen=True)
class KeptTokens:
    """The vocabulary that a sampler's top-p and top-k left to each token, ragged.

    The set of token t is ``ids[offsets[t]:offsets[t + 1]]``; an empty one stands for the whole
    vocabulary.
    """

    ids: np.ndarray  #: int32 [n], different in a set
    offsets: np.ndarray  #: int64 [N + 1], from 0 to n

    @classmethod
    def of_sizes(cls, ids: np.ndarray, sizes: np.ndarray) -> KeptTokens:
        """Sets of these sizes, int [N], one behind the other in ``ids``."""
        offsets = np.concatenate([[0], np.cumsum(sizes)])
        return cls(ids.astype(np.int32), offsets.astype(np.int64))

    @classmethod
    def empty(cls, count: int) -> KeptTokens:
        """``count`` empty sets."""
        return cls.of_sizes(np.zeros(0), np.zeros(count))

    @classmethod
    def join(cls, parts: Sequence[KeptTokens]) -> KeptTokens:
        """The sets of all parts, in order."""
        parts = [cls.empty(0), *parts]
        ids, sizes = ([getattr(part, name) for part in parts] for name in ("ids", "sizes"))
        return cls.of_sizes(np.concatenate(ids), np.concatenate(sizes))

    @property
    def sizes(self) -> np.ndarray:
        """Number of ids of each token, int64 [N]."""
        return np.diff(self.offsets)

    def rows(self) -> np.ndarray:
        """The token that each of ``ids`` belongs to, int64 [n]."""
        return np.repeat(np.arange(len(self.offsets) - 1), self.sizes)

    def select(self, tokens: np.ndarray) -> KeptTokens:
        """The sets of these tokens, int64, in their order; of a token -1 an empty one."""
        sizes = np.append(self.sizes, 0)[tokens]
        ends = np.cumsum(sizes)
        shift = np.append(self.offsets[:-1], 0)[tokens] - (ends - sizes)
        places = np.arange(sizes.sum()) + np.repeat(shift, sizes)
        return KeptTokens.of_sizes(self.ids[places], sizes)

    def missing(self, tokens: np.ndarray) -> np.ndarray:
        """bool [N]: which of the tokens, int64 [N], are outside of their sets, if not empty."""
        rows = self.rows()
        found = np.bincount(rows[self.ids == tokens[rows]], minlength=len(tokens)) > 0
        return ~found & (self.sizes > 0)


@dataclass(frozen=True)
class Completion:
    """The tokens after a prompt: one sampled answer, or several turns with an environment's tokens
    between them.
    """

    tokens: np.ndarray  #: int64 [N], N >= 1, with the stop token when ``finished``
    #: float32 [N], log-probability of each written token under the sampler at its temperature; with
    #: ``kept`` over the token's set
    logprobs: np.ndarray
    finished: bool  #: True: it ended with a stop token; False: cut at the length limit
    text: str  #: decoded, without special tokens and the stop token
    #: of prompt and completion, P + N - 1 tokens; None: not requested, or the engine lacks them
    routed_experts: RoutedExperts | None = None
    #: version of the sampling weights: number of earlier changes in this process
    version: int | None = None
    #: version of the weights that sampled its last token (partial rollout)
    last_version: int | None = None
    #: bool [N], tokens that the policy wrote; other ``logprobs`` have no meaning; None: all
    written: np.ndarray | None = None
    #: with several turns, the policy's text in the last; None: one turn, see ``text``
    last_text: str | None = None
    #: N sets, what top-p and top-k kept; None: not requested, or of no use to this pipeline stage
    kept: KeptTokens | None = None

    @property
    def judged_text(self) -> str:
        """The text that a verifier judges: the last turn."""
        return self.text if self.last_text is None else self.last_text

    @property
    def num_written(self) -> int:
        """Number of tokens that the policy wrote."""
        return len(self.tokens) if self.written is None else int(self.written.sum())

    @property
    def longest_turn(self) -> int:
        """Length of the longest unbroken run of tokens that the policy wrote."""
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
    """One sequence to train on, with all that the loss needs.

    The policy's tokens may be anywhere: after a prompt, in several turns with an environment's text
    between them, or nowhere. A policy's token at place 0 is not trained on, since no token before
    it predicts it.

    Supervised fine-tuning makes the same record with ``advantage`` 1 and ``rollout_logprobs`` None.
    """

    tokens: np.ndarray  #: int64 [M], M >= 1
    written: np.ndarray  #: bool [M], the tokens that the policy wrote
    advantage: float = 1.0
    #: float32 [M], log-probability of each written token under the sampler; others are not read
    rollout_logprobs: np.ndarray | None = None
    routed_experts: RoutedExperts | None = (
        None  #: the sampler's experts of the first tokens, at most M
    )
    #: M sets, over which the log-probabilities of the policy are taken; None: the whole vocabulary
    kept: KeptTokens | None = None

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
        kept: KeptTokens | None = None,
    ) -> Sample:
        """A prompt (int64 [P]) and what follows it (int64 [N]), with the sampler's ``logprobs``
        (float32 [N]) and ``kept`` tokens (N sets); ``written``: bool [N], None: the policy wrote
        all of it.
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
            None if kept is None else KeptTokens.join([KeptTokens.empty(len(prompt)), kept]),
        )

    @property
    def trained(self) -> np.ndarray:
        """bool [M - 1]: whether the token at place t + 1, which place t predicts, is trained on."""
        return self.written[1:]

    @property
    def num_read(self) -> int:
        """Number of tokens that the model reads, from the first: all but the last, which predicts
        nothing; of one token that one.
        """
        return max(1, len(self.tokens) - 1)


@dataclass(frozen=True)
class SharedRow:
    """What the model runs on for a pack whose sequences share prompts: R rows, a token each.

    The rows are segments one behind the other, each padded to a multiple of the pack's
    ``sequence_multiple``, then padding. A segment is a whole sequence, a prompt, or an answer that
    continues a prompt's segment, all without last tokens; of an answer of one token none is left.
    """

    tokens: np.ndarray  #: int64 [R]
    lengths: tuple[int, ...]  #: of the segments, in order, without padding
    parents: tuple[int, ...]  #: of each segment the number of the prompt it continues; -1: none
    places: np.ndarray  #: int64 [T], the row that stands for each token of the pack; 0 on padding


@dataclass(frozen=True)
class Pack:
    """Several sequences concatenated in a row of T tokens: one micro-batch. Their last tokens are
    targets only, see `Sample.num_read`.

    Position t predicts ``targets[t]``, the next token of the same sequence; ``mask[t]`` is True
    where the policy wrote that target. Each sequence is padded to a multiple of
    ``sequence_multiple`` tokens, and the row ends with padding. Padding belongs to no sequence. An
    empty pack (no sequence, all padding) is legal: it keeps the number of packs equal on every
    rank.

    Where sequences share prompts the model runs on the fewer tokens of ``shared``. The pack itself
    holds every sequence whole all the same, without padding between them, so that losses know
    nothing of it.
    """

    tokens: np.ndarray  #: int64 [T]
    targets: np.ndarray  #: int64 [T]; 0 where there is none
    positions: np.ndarray  #: int64 [T], position within the sequence, from 0
    mask: np.ndarray  #: bool [T]
    sequence_ids: np.ndarray  #: int64 [T], 0..S-1 in order; S on padding, between them too
    lengths: tuple[int, ...]  #: S lengths of what is read, in order, without padding
    advantages: np.ndarray  #: float32 [T], the sequence's advantage at every position; 0 on padding
    rollout_logprobs: np.ndarray | None = None  #: float32 [T], 0 outside the mask
    sequence_multiple: int = 1  #: sequences begin at multiples of it
    #: the sampler's, of T tokens, or of the R rows of ``shared``; see `data.packing`
    routed_experts: RoutedExperts | None = None
    shared: SharedRow | None = None  #: None: the model runs on ``tokens``
    members: tuple[int, ...] = ()  #: S places of the sequences in the list that was packed
    #: T sets, of the targets; empty outside the mask; None: no target has one
    kept: KeptTokens | None = None

    @property
    def num_rows(self) -> int:
        """Number of tokens that the model runs on, padding included."""
        return len(self.tokens if self.shared is None else self.shared.tokens)

    @property
    def segments(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Lengths and parents of the segments that the model runs on; see `SharedRow`."""
        if self.shared is None:
            return self.lengths, (-1,) * len(self.lengths)
        return self.shared.lengths, self.shared.parents

    @property
    def num_tokens(self) -> int:
        """T, padding included."""
        return len(self.tokens)

    @property
    def num_sequences(self) -> int:
        """S."""
        return len(self.lengths)
