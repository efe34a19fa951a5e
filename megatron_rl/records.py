"""The records that travel between the stages of a step. Small, frozen, made of NumPy arrays; no
torch, no Megatron.

    Prompt -> RolloutGroup -> Sample -> Pack -> (scored, trained)

Legend of shapes: T tokens of a pack, S sequences of a pack, N tokens of one completion, G
completions of a prompt.
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
    are all it needs; other engines give all of them.
    """

    ids: np.ndarray  #: uint8, int16 or int32 [tokens, L', K], global expert ids, different in a row
    layers: tuple[int, ...]  #: L' global numbers (from 1) of MoE layers, ascending


@dataclass(frozen=True)
class Completion:
    """One sampled answer to a prompt."""

    tokens: np.ndarray  #: int64 [N], N >= 1, with the stop token when ``finished``
    #: float32 [N], log-probability of each token under the sampler at its temperature
    logprobs: np.ndarray
    finished: bool  #: True: it ended with a stop token; False: cut at the length limit
    text: str  #: decoded, without special tokens and the stop token
    #: of prompt and answer, P + N - 1 tokens; None: the engine was not asked, or cannot tell
    routed_experts: RoutedExperts | None = None
    #: of the weights that made it: how often they had changed by then in this process
    version: int | None = None
    #: of the weights that sampled its last token, where they changed meanwhile
    last_version: int | None = None


@dataclass(frozen=True)
class RolloutGroup:
    """A prompt with its G completions: the unit in which advantages are normalised. Never split
    over ranks.
    """

    prompt: Prompt
    completions: tuple[Completion, ...]


@dataclass(frozen=True)
class Sample:
    """One sequence to train on: a prompt and a completion, with what the loss needs to know of it.

    Supervised fine-tuning makes the same record with ``advantage`` 1 and ``rollout_logprobs`` None.
    """

    tokens: np.ndarray  #: int64 [P + N]
    prompt_length: int  #: P; tokens[P:] are trained on
    advantage: float = 1.0
    rollout_logprobs: np.ndarray | None = None  #: float32 [N]
    routed_experts: RoutedExperts | None = None  #: the sampler's, of P + N - 1 tokens


@dataclass(frozen=True)
class Pack:
    """Several sequences laid one behind the other in a row of T tokens: one micro-batch.

    Position t predicts ``targets[t]``, the next token of the same sequence; ``mask[t]`` is True
    where that target belongs to a completion. The row ends with padding; behind a sequence there is
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
