"""The output layer without logits: from hidden states to log-probabilities and entropies.

Logits exist for some words at a time. The forward pass keeps a running maximum and sums
(the online softmax of Milakov and Gimelshein, arXiv 1805.02867); the backward pass computes each
tile again from the saved normaliser [T], unless one tile holds all logits: that is kept. What a
bf16 output layer rounds is rounded here too.

Legend: T tokens, V words, D hidden.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch.distributed import ProcessGroup

from megatron_rl.parallel.collectives import gather_first_dim
from megatron_rl.parallel.kept_words import KeptWords
from megatron_rl.parallel.vocab_tiles import NEVER, Slope, SoftmaxSums, Tiles

#: none: not computed; detached: a metric; differentiable: part of a loss.
Entropy = Literal["none", "detached", "differentiable"]


@dataclass(frozen=True)
class VocabHead:
    """This rank's slice of the output layer, its words split over the tensor-parallel group."""

    weight: torch.Tensor  #: [V_padded / tp, D]
    words: int  #: leading rows of it that are words; the others are padding
    group: ProcessGroup  #: tensor-parallel; its ranks hold the words in rank order
    fp32: bool = False  #: multiply in fp32 where hidden states and weights are bf16

    def gather(self, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states of all tokens: [T / tp, D] or [T / tp, 1, D] of each rank -> [T, D].

        Differentiable; the backward pass sums what the ranks' words give. A collective.
        """
        rows = hidden.reshape(-1, hidden.shape[-1])
        return gather_first_dim(rows, self.group, sum_gradients=True)

    def logits(self, rows: torch.Tensor) -> torch.Tensor:
        """[T, D] -> [T, V_padded / tp], `NEVER` for padding: of few tokens, as in decoding."""
        weight = self.weight
        if self.fp32:
            rows, weight = rows.float(), weight.float()
        logits = rows @ weight.t()
        if self.words < len(weight):
            padding = torch.arange(len(weight), device=logits.device) >= self.words
            logits = logits.masked_fill(padding, NEVER)
        return logits


class HeadValues(NamedTuple):
    """What the head says of T tokens and their targets."""

    logprobs: torch.Tensor  #: fp32 [T], differentiable in hidden states and weight
    entropy: torch.Tensor | None  #: fp32 [T], nats; None where not asked for
    hits: torch.Tensor  #: bool [T], whether no word has a larger logit than the target


def head_values(
    rows: torch.Tensor,
    head: VocabHead,
    targets: torch.Tensor,
    temperature: float,
    *,
    entropy: Entropy = "none",
    kept: KeptWords | None = None,
) -> HeadValues:
    """log softmax(rows @ weight^T / temperature) at the targets, and more. A collective.

    Args:
        rows: [T, D], alike on all ranks of the group; T may be 0. Their gradient is of this rank's
            words only (see `VocabHead.gather`). head: the output layer. targets: int64 [T], ids
            of the whole vocabulary. temperature: divides the logits; > 0.
        entropy: of softmax(logits / temperature).
        kept: the words that each token may take, its target among them: the softmax is over these
            (arXiv 2512.02556, section 3.1), so all values are of the renormalised distribution.
            Only words that occur are multiplied. None: every word.
    """
    inverse = 1.0 / temperature
    trains = torch.is_grad_enabled()
    return HeadValues(
        *_Head.apply(rows, head.weight, head, targets, inverse, entropy, kept, trains)
    )


class _Head(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows: torch.Tensor,
        weight: torch.Tensor,
        head: VocabHead,
        targets: torch.Tensor,
        inverse: float,
        entropy: Entropy,
        kept: KeptWords | None,
        trains: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
        tiles = _tiles(rows, weight, head, targets, kept)
        one = trains and len(tiles.words) == 1
        sums = SoftmaxSums(len(rows), inverse, entropy != "none", rows.device, keep=one)
        logits = None
        for words in tiles.words:
            logits = tiles.logits(tiles.weight(words), words)
            sums.add(logits, *tiles.targets_in(words))
        sums.reduce(head.group)
        log_total = sums.total.log()
        logprobs = (sums.picked - sums.peak) * inverse - log_total
        found = None if entropy == "none" else log_total - sums.weighted / sums.total
        hits = sums.picked >= sums.peak
        saved = [rows, weight, targets, sums.peak * inverse + log_total, logits if one else None]
        if entropy == "differentiable":
            ctx.save_for_backward(*saved, found)
            ctx.mark_non_differentiable(hits)
        else:
            ctx.save_for_backward(*saved)
            ctx.mark_non_differentiable(hits, *([] if found is None else [found]))
        ctx.head, ctx.inverse, ctx.kept = head, inverse, kept
        return logprobs, found, hits

    @staticmethod
    def backward(
        ctx: Any, grad_logprobs: torch.Tensor, grad_entropy: torch.Tensor | None, _: Any
    ) -> tuple[torch.Tensor | None, ...]:
        rows, weight, targets, normaliser, logits, *entropy = ctx.saved_tensors
        slope = Slope(ctx.inverse, normaliser, grad_logprobs)
        if entropy:
            assert grad_entropy is not None, "it is an output"
            slope.add_entropy(entropy[0], grad_entropy)
        trained = ctx.needs_input_grad[1]
        tiles = _tiles(rows, weight, ctx.head, targets, ctx.kept)
        grad_rows, grad_weight = head_gradients(tiles, slope, weight if trained else None, logits)
        return grad_rows.to(rows.dtype), grad_weight, None, None, None, None, None, None


def head_gradients(
    tiles: Tiles, slope: Slope, weight: torch.Tensor | None, kept: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The gradient of a loss in the hidden states, fp32 [T, D] of this rank's words, and in the
    weight [V_padded / tp, D], in its type; None for a weight that is not trained. ``kept``: the
    logits of the only tile; None: they are made again.
    """
    factor = -slope.sign[:, None]
    signed = tiles.rows * factor.to(tiles.rows.dtype)
    grad_rows = torch.zeros_like(tiles.rows, dtype=torch.float32)
    grad_weight = None if weight is None else torch.zeros_like(weight)
    for words in tiles.words:
        part = tiles.weight(words)
        logits = tiles.logits(part, words) if kept is None else kept
        grad = slope.of(logits, *tiles.targets_in(words), out=tiles.room(logits))
        rounded = tiles.rounded(grad)
        if grad_weight is not None:
            of_words = (rounded.t() @ signed).to(grad_weight.dtype)
            grad_weight[tiles.places(words)] = of_words
        _add_product(grad_rows, rounded, grad, part)
    return grad_rows.mul_(factor), grad_weight


def _add_product(
    total: torch.Tensor, left: torch.Tensor, same: torch.Tensor, right: torch.Tensor
) -> None:
    """total += left @ right in fp32, of factors in any type; ``same`` is ``left`` in fp32.

    So a sum over tiles is rounded once, as a whole product is. No CPU multiplies bf16 into fp32.
    """
    if total.is_cuda and left.dtype != torch.float32:
        total.add_(torch.mm(left, right, out_dtype=torch.float32))
    else:
        total.addmm_(same, right.float())


def _tiles(
    rows: torch.Tensor,
    weight: torch.Tensor,
    head: VocabHead,
    targets: torch.Tensor,
    kept: KeptWords | None,
) -> Tiles:
    first = head.group.rank() * len(weight)
    if kept is None:
        return Tiles(rows, weight[: head.words], targets - first, fp32=head.fp32)
    mine, targets = kept.of_rank(first, head.words), kept.places(targets, first)
    return Tiles(rows, weight[: head.words], targets, fp32=head.fp32, kept=mine)
