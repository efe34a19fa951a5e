"""From logits to tokens: temperature, top-k, top-p, greedy.

Each answer has a fixed sequence of uniform numbers. A token is found by inverting the cumulative
distribution in vocabulary order. So an answer depends on the seed, its prompt and its number among
the answers that the step draws to that prompt. It does not depend on the batch, the rank or the
layout.
"""

from __future__ import annotations

from typing import Sequence

import numpy as np
import torch

from megatron_rl.parallel.collectives import broadcast
from megatron_rl.parallel.groups import Groups
from megatron_rl.rollout.engine import SamplingSettings

#: Elements of the distribution held in double precision at a time (256 MiB).
CHUNK_ELEMENTS = 1 << 25
#: Tokens whose probabilities are summed before the running sum: near the root of a vocabulary.
BLOCK = 64


def uniforms(seed: int, sequences: Sequence[tuple[int, int]], count: int) -> np.ndarray:
    """Uniform numbers in [0, 1) of each sequence (prompt index, sample number): float64 [R, count].

    Philox 4x64 (Salmon et al., SC 2011) with key (seed, 0). The sequence is the upper half of the
    counter, so the sequences of a seed never overlap.
    """
    numbers = np.empty((len(sequences), count))
    for row, (index, sample) in enumerate(sequences):
        counter = np.array([0, 0, sample, index], dtype=np.uint64)
        bits = np.random.Philox(key=np.array([seed, 0], dtype=np.uint64), counter=counter)
        numbers[row] = np.random.Generator(bits).random(count)
    return numbers


def draw(
    logits: torch.Tensor | None,
    uniform: torch.Tensor | None,
    like: torch.Tensor,
    settings: SamplingSettings,
    groups: Groups,
    kept: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`sample`, with the same tokens on all ranks of a replica: those of the last pipeline stage.

    Args:
        logits: [R, V] on the last stage; None on the others.
        uniform, settings, kept: see `sample`. The results are those of the rank with logits that
            is the first of its tensor-parallel group, so ``kept`` is needed there only.
        like: int64 [R], on the device.
        groups: process groups.
    """
    alone = groups.tensor.size() == groups.pipeline.size() == 1
    if alone and len(like):
        assert logits is not None, "on the last stage"
        return sample(logits, uniform, settings, kept)
    drawn = torch.zeros(2, len(like), dtype=torch.float64, device=like.device)
    if len(like):
        if logits is not None:
            found = sample(logits, uniform, settings, kept)
            drawn = torch.stack([part.double() for part in found])
            broadcast(drawn, groups.tensor)
        broadcast(drawn, groups.pipeline, groups.pipeline.size() - 1)
    tokens, logprobs = drawn
    return tokens.long(), logprobs.float()


def sample(
    logits: torch.Tensor,
    uniform: torch.Tensor | None,
    settings: SamplingSettings,
    kept: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw one token for each row.

    Args:
        logits: [R, V] in any floating type.
        uniform: float64 [R] in [0, 1); None under greedy.
        settings: temperature, top_k, top_p, greedy.
        kept: bool [R, V], set to the tokens that top-k and top-p keep; not with greedy.

    Returns:
        Tokens int64 [R], and their log-probabilities fp32 [R] under softmax(logits / temperature)
        over the whole vocabulary, also with top-k, top-p or greedy; with ``kept`` over the tokens
        kept, which is what they are drawn from.
    """
    rows = max(1, CHUNK_ELEMENTS // logits.shape[1])
    parts = []
    for first in range(0, max(len(logits), 1), rows):
        chunk = slice(first, first + rows)
        part = None if uniform is None else uniform[chunk]
        mask = None if kept is None else kept[chunk]
        parts.append(_sample_chunk(logits[chunk], part, settings, mask))
    tokens, logprobs = zip(*parts)
    return torch.cat(tokens), torch.cat(logprobs)


def _sample_chunk(
    logits: torch.Tensor,
    uniform: torch.Tensor | None,
    settings: SamplingSettings,
    kept: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    scaled = logits.float()
    if settings.temperature != 1.0:
        scaled = scaled / settings.temperature
    whole = scaled.softmax(dim=-1)
    probs = whole
    if settings.greedy:
        tokens = logits.argmax(dim=-1)
    else:
        assert uniform is not None, "only greedy sampling needs none"
        probs = truncated(whole, settings.top_k, settings.top_p)
        tokens = invert_cdf(probs, uniform)
    # The likeliest token's probability is 1 / sum(exp(logit - largest)). The logarithm of the
    # drawn token's own would have the error of its exponential.
    below = scaled.gather(1, tokens[:, None]).squeeze(1) - scaled.amax(dim=-1)
    drawn = below + whole.amax(dim=-1).log()
    if kept is not None:
        assert not settings.greedy, "greedy answers have no kept tokens"
        torch.gt(probs, 0.0, out=kept)
        drawn = (drawn - probs.sum(1, dtype=torch.float64).log()).float()
    return tokens, drawn


def truncated(probs: torch.Tensor, top_k: int, top_p: float) -> torch.Tensor:
    """Probabilities [R, V], which may not be normalised, with zeros outside the top-k, then outside
    the nucleus.

    The nucleus is the smallest set of the likeliest tokens whose share of the probability left by
    top-k reaches ``top_p`` (Holtzman et al., arXiv 1904.09751, eq. 2). Tokens as likely as the last
    one kept are kept too, so the result does not depend on how a sort breaks ties.
    """
    if 0 < top_k < probs.shape[1]:
        last = probs.topk(top_k, dim=-1).values[:, -1:]
        probs = probs.masked_fill(probs < last, 0.0)
    if top_p < 1.0:
        ordered = probs.sort(dim=-1, descending=True).values
        mass = ordered.double().cumsum(-1)
        # A token is inside if the tokens before it do not reach top_p; the first always is.
        inside = (mass - ordered) < top_p * mass[:, -1:]
        last = ordered.masked_fill(~inside, float("inf")).amin(dim=-1, keepdim=True)
        probs = probs.masked_fill(probs < last, 0.0)
    return probs


def invert_cdf(probs: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """The token [R] whose part of the distribution ``uniform`` [R] falls into; never a token with
    probability 0.

    Sums in two levels: first the block of tokens is found, then the token in it. A running sum over
    all tokens would cost more.
    """
    rows, vocabulary = probs.shape
    whole = vocabulary // BLOCK * BLOCK
    sums = probs[:, :whole].unflatten(1, (-1, BLOCK)).sum(-1, dtype=torch.float64)
    if whole < vocabulary:
        sums = torch.cat([sums, probs[:, whole:].sum(-1, keepdim=True, dtype=torch.float64)], 1)
    ends = sums.cumsum(-1)
    point = uniform[:, None] * ends[:, -1:]
    block = _first_above(ends, point)
    point = (point - (ends.gather(1, block) - sums.gather(1, block))).clamp(min=0.0)
    places = block * BLOCK + torch.arange(BLOCK, device=probs.device)
    inside = probs.gather(1, places.clamp(max=vocabulary - 1))
    if whole < vocabulary:
        inside = inside.masked_fill(places >= vocabulary, 0.0)
    found = block * BLOCK + _first_above(inside.double().cumsum(-1), point)
    # Of a row of NaN the last: its log-probability is NaN, which the caller can report.
    return found.squeeze(1).clamp(max=vocabulary - 1)


def _first_above(ends: torch.Tensor, point: torch.Tensor) -> torch.Tensor:
    """The first place [R, 1] whose sum in ``ends`` [R, n] is above ``point`` [R, 1], 0 or more."""
    # It adds something, so its probability is positive. There is one if the point is below the
    # total, and rounding may raise it to the total or above.
    total = ends[:, -1:]
    point = torch.minimum(point, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(ends, point, right=True).clamp(max=ends.shape[1] - 1)
