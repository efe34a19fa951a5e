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

#: Elements of the double-precision cumulative distribution held at a time (256 MiB).
CHUNK_ELEMENTS = 1 << 25


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
    logprobs = torch.log_softmax(logits.float() / settings.temperature, dim=-1)
    if settings.greedy:
        tokens = logits.argmax(dim=-1)
    else:
        assert uniform is not None, "only greedy sampling needs none"
        probs = truncated(logprobs, settings.top_k, settings.top_p)
        tokens = invert_cdf(probs, uniform)
    drawn = logprobs.gather(1, tokens[:, None]).squeeze(1)
    if kept is not None:
        assert not settings.greedy, "greedy answers have no kept tokens"
        torch.gt(probs, 0.0, out=kept)
        drawn = (drawn - probs.sum(1, dtype=torch.float64).log()).float()
    return tokens, drawn


def truncated(logprobs: torch.Tensor, top_k: int, top_p: float) -> torch.Tensor:
    """Probabilities [R, V], not normalised: zero outside the top-k, then outside the nucleus.

    The nucleus is the smallest set of the likeliest tokens whose share of the probability left by
    top-k reaches ``top_p`` (Holtzman et al., arXiv 1904.09751, eq. 2). Tokens as likely as the last
    one kept are kept too, so the result does not depend on how a sort breaks ties.
    """
    probs = logprobs.exp()
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
    """
    cdf = probs.double().cumsum(-1)
    total = cdf[:, -1]
    # The smallest token with cdf > point has a positive probability. There is one if the point is
    # below the total, and rounding may raise u * total to the total itself.
    point = torch.minimum(uniform * total, torch.nextafter(total, torch.zeros_like(total)))
    # The clamp keeps a row of NaN from giving a token that does not exist. Its log-probability is
    # NaN, which the caller can report.
    last = probs.shape[1] - 1
    return torch.searchsorted(cdf, point[:, None], right=True).squeeze(1).clamp(max=last)
