"""Tiles of logits, all tokens x some words: what the head sums over them, and its gradient in them.

Legend: T tokens, D hidden, n words of a tile.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from megatron_rl.parallel.collectives import all_reduce
from megatron_rl.parallel.kept_words import RankWords

#: Logit of a row of padding, and of a word that a token may not take. Finite,
#: because 0 * inf would spoil entropies; far below any logit at any temperature.
NEVER = -1e9

#: Logits of a tile, tokens x words. On a CPU (measured) what works on it stays in the caches; on
#: CUDA it fills the device.
TILE = {"cpu": 1 << 21, "cuda": 1 << 25}
#: Words of a tile at least, however many tokens there are: fewer make a product slow.
LEAST_WORDS = 64


class Tiles:
    """The logits of T tokens and this rank's words, some words at a time, in memory of one tile."""

    def __init__(
        self,
        rows: torch.Tensor,
        weight: torch.Tensor,
        targets: torch.Tensor,
        *,
        fp32: bool,
        kept: RankWords | None = None,
    ) -> None:
        """
        Args:
            rows: hidden states [T, D]. weight: [V, D] of this rank's words. targets: int64 [T],
                relative to the first of them; those of other ranks are outside.
            fp32: multiply in fp32, whatever the types are.
            kept: the words that each token may take: the tiles are of those that occur, among which
                ``targets`` are places. None: every word.
        """
        self.rows = rows.float() if fp32 else rows
        self._weight, self._targets, self._fp32, self._kept = weight, targets, fp32, kept
        tokens, words = len(rows), len(weight) if kept is None else kept.count
        step = max(LEAST_WORDS, TILE.get(rows.device.type, TILE["cuda"]) // max(tokens, 1))
        starts = range(0, words if tokens else 0, step)
        self.words = [slice(start, min(start + step, words)) for start in starts]
        size = tokens * min(step, words)
        self._wide = torch.empty(size, dtype=torch.float32, device=rows.device)
        self._narrow = self._wide
        if self.rows.dtype != torch.float32:
            self._narrow = torch.empty(size, dtype=self.rows.dtype, device=rows.device)
        self._outside = torch.empty(
            0 if kept is None else size, dtype=torch.bool, device=rows.device
        )

    def places(self, words: slice) -> slice | torch.Tensor:
        """Where the words of a tile are in the weight."""
        return words if self._kept is None or self._kept.words is None else self._kept.words[words]

    def weight(self, words: slice) -> torch.Tensor:
        """[n, D] in the type of the products."""
        weight = self._weight[self.places(words)]
        return weight.float() if self._fp32 else weight

    def logits(self, weight: torch.Tensor, words: slice) -> torch.Tensor:
        """fp32 [T, n], rounded to the type of the products, of these words and their weight;
        `NEVER` for words that a token may not take. The next call overwrites them.
        """
        logits = self._products(weight)
        if self._kept is not None:
            logits.masked_fill_(self._kept.outside(words, self._outside), NEVER)
        return logits

    def _products(self, weight: torch.Tensor) -> torch.Tensor:
        shape = (len(self.rows), len(weight))
        count = shape[0] * shape[1]
        product = torch.mm(self.rows, weight.t(), out=self._narrow[:count].view(shape))
        if product.dtype == torch.float32:
            return product
        return self._wide[:count].view(shape).copy_(product)

    def room(self, logits: torch.Tensor) -> torch.Tensor:
        """Where the next call of `logits` writes, in the shape of a tile that was kept."""
        return self._wide[: logits.numel()].view_as(logits)

    def rounded(self, tile: torch.Tensor) -> torch.Tensor:
        """The fp32 tile in the type of the products, by which it is replaced in fp32 too."""
        if self._narrow is self._wide:
            return tile
        narrow = self._narrow[: tile.numel()].view_as(tile).copy_(tile)
        tile.copy_(narrow)
        return narrow

    def targets_in(self, words: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """Columns of the targets in a tile, int64 [T, 1], and whether they lie in it, bool [T]."""
        count = words.stop - words.start
        local = self._targets - words.start
        return local.clamp(0, count - 1)[:, None], (local >= 0) & (local < count)


class SoftmaxSums:
    """Sums [T] of a softmax over tiles of words, relative to the largest logit so far."""

    def __init__(
        self, num_tokens: int, inverse: float, entropy: bool, device: torch.device, keep: bool
    ) -> None:
        """``inverse``: 1 / temperature. ``entropy``: sum what it needs too. ``keep``: the tiles are
        still needed.
        """
        zeros = torch.zeros(num_tokens, device=device)
        self.peak = torch.full_like(zeros, NEVER)  #: largest logit
        self.picked = zeros  #: logit of the target
        self.total = zeros.clone()  #: sum of exp(x), x = (logit - peak) / temperature
        self.weighted = zeros.clone()  #: sum of exp(x) x
        self._inverse, self._entropy, self._keep = inverse, entropy, keep
        self._spare = torch.empty(0, device=device)

    def add(self, logits: torch.Tensor, columns: torch.Tensor, here: torch.Tensor) -> None:
        """Add a tile [T, n], which it overwrites unless it is to be kept; targets as of
        `Tiles.targets_in`.
        """
        self.picked += torch.where(here, logits.gather(1, columns).squeeze(1), 0.0)
        self._rebase(torch.maximum(self.peak, logits.amax(1)))
        base = self.peak[:, None] * -self._inverse
        place = torch.empty_like(logits) if self._keep else logits
        shifted = torch.add(base, logits, alpha=self._inverse, out=place)
        if not self._entropy:
            self.total += shifted.exp_().sum(1)
            return
        if self._spare.numel() < shifted.numel():
            self._spare = torch.empty_like(shifted).flatten()
        exp = torch.exp(shifted, out=self._spare[: shifted.numel()].view_as(shifted))
        self.total += exp.sum(1)
        self.weighted += exp.mul_(shifted).sum(1)

    def reduce(self, group: ProcessGroup) -> None:
        """The sums over the words of all ranks of the group. A collective."""
        if group.size() == 1 or not len(self.peak):
            return
        self._rebase(all_reduce(self.peak, group, dist.ReduceOp.MAX))
        sums = torch.stack([self.total, self.weighted, self.picked])
        self.total, self.weighted, self.picked = all_reduce(sums, group).unbind()

    def _rebase(self, peak: torch.Tensor) -> None:
        less = (self.peak - peak) * self._inverse
        keep = less.exp()
        self.weighted = keep * (self.weighted + less * self.total)
        self.total = keep * self.total
        self.peak = peak


class Slope:
    """The gradient of a loss in logits, from its gradients g in the log-probability of the target
    y and e in the entropy H:

        d log p_y / d x_j = [j = y] - p_j,    d H / d x_j = -p_j (log p_j + H)

    Without e a tile holds |g| (p - [j = y]), with |g| in the exponent: no pass over it to multiply.
    """

    def __init__(
        self, inverse: float, normaliser: torch.Tensor, grad_logprobs: torch.Tensor
    ) -> None:
        """``inverse``: 1 / temperature. ``normaliser``: log sum exp(logit / temperature), [T]."""
        scale = grad_logprobs * inverse
        self.sign = scale.sign()  #: [T], of every tile's rows
        self._inverse = inverse
        self._at_target = -scale.abs()
        self._base = (scale.abs().log() - normaliser)[:, None]
        self._normaliser, self._scale = normaliser, scale
        self._factor: tuple[torch.Tensor, torch.Tensor] | None = None

    def add_entropy(self, entropy: torch.Tensor, grad_entropy: torch.Tensor) -> None:
        """Add the gradient in the entropies, given with their values: both [T]."""
        steep = grad_entropy * self._inverse
        self._factor = (self._scale + steep * entropy)[:, None], steep[:, None]
        self._base = -self._normaliser[:, None]
        self._at_target = -self._scale
        self.sign = torch.ones_like(self.sign)

    def of(
        self, logits: torch.Tensor, columns: torch.Tensor, here: torch.Tensor, out: torch.Tensor
    ) -> torch.Tensor:
        """-sign * d loss / d logits [T, n], fp32, into ``out``, which may be the logits."""
        grad = torch.add(self._base, logits, alpha=self._inverse, out=out)
        if self._factor is None:
            grad = grad.exp_()
        else:
            grad = torch.mul(grad.exp(), torch.addcmul(*self._factor, grad), out=grad)
        return grad.scatter_add_(1, columns, (self._at_target * here)[:, None])
