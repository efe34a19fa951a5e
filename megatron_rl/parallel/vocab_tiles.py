"""Tiles of logits, tokens x words: what the head sums over them, and its gradient in them.

Legend: T tokens, D hidden, t and n tokens and words of a tile.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from megatron_rl.parallel.collectives import all_reduce

#: Logit of a row of padding. Finite, because 0 * inf would spoil entropies; far below any logit at
#: any temperature.
NEVER = -1e9

#: Tokens and words of a tile. On a CPU (measured) what works on it stays in the caches; on CUDA it
#: fills the device.
TILES = {"cpu": (1024, 1024), "cuda": (8192, 4096)}


class Tiles:
    """The logits of T tokens and this rank's words, a tile at a time, in memory of one tile."""

    def __init__(
        self, rows: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, *, fp32: bool
    ) -> None:
        """
        Args:
            rows: hidden states [T, D]. weight: [V, D] of this rank's words. targets: int64 [T],
                relative to the first of them; those of other ranks are outside.
            fp32: multiply in fp32, whatever the types are.
        """
        num_tokens, num_words = TILES.get(rows.device.type, TILES["cuda"])
        self.tokens = _slices(len(rows), num_tokens)
        self.words = _slices(len(weight), num_words) if len(rows) else []
        self.rows = rows.float() if fp32 else rows
        self._weight, self._targets, self._fp32 = weight, targets, fp32
        size = min(num_tokens, len(rows)) * min(num_words, len(weight))
        self._wide = torch.empty(size, dtype=torch.float32, device=rows.device)
        self._narrow = self._wide
        if self.rows.dtype != torch.float32:
            self._narrow = torch.empty(size, dtype=self.rows.dtype, device=rows.device)
        self._held: tuple[slice, torch.Tensor] | None = None

    def weight_of(self, words: slice) -> torch.Tensor:
        """[n, D] in the type of the products."""
        if not self._fp32:
            return self._weight[words]
        if self._held is None or self._held[0] != words:
            self._held = words, self._weight[words].float()
        return self._held[1]

    def logits(self, words: slice, tokens: slice) -> torch.Tensor:
        """fp32 [t, n], rounded to the type of the products; the next call overwrites them."""
        rows, weight = self.rows[tokens], self.weight_of(words)
        shape = (len(rows), len(weight))
        count = len(rows) * len(weight)
        product = torch.mm(rows, weight.t(), out=self._narrow[:count].view(shape))
        if product.dtype == torch.float32:
            return product
        return self._wide[:count].view(shape).copy_(product)

    def narrow(self, tile: torch.Tensor) -> torch.Tensor:
        """An fp32 tile in the type of the products; the next call overwrites it."""
        if self._narrow is self._wide:
            return tile
        return self._narrow[: tile.numel()].view_as(tile).copy_(tile)

    def targets_in(self, words: slice, tokens: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """Columns of the targets in a tile, int64 [t, 1], and whether they lie in it, bool [t]."""
        count = words.stop - words.start
        local = self._targets[tokens] - words.start
        return local.clamp(0, count - 1)[:, None], (local >= 0) & (local < count)


def add_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """total += a @ b, in fp32; factors of bf16 are multiplied as such."""
    if a.dtype == torch.float32:
        total.addmm_(a, b)
    else:
        total.add_(a @ b)


class SoftmaxSums:
    """Sums [T] of a softmax over tiles of words, relative to the largest logit so far."""

    def __init__(
        self, num_tokens: int, inverse: float, entropy: bool, device: torch.device
    ) -> None:
        """``inverse``: 1 / temperature. ``entropy``: sum what it needs too."""
        zeros = torch.zeros(num_tokens, device=device)
        self.peak = torch.full_like(zeros, NEVER)  #: largest logit
        self.picked = zeros  #: logit of the target
        self.total = zeros.clone()  #: sum of exp(x), x = (logit - peak) / temperature
        self.weighted = zeros.clone()  #: sum of exp(x) x
        self._inverse, self._entropy = inverse, entropy
        self._spare = torch.empty(0, device=device)

    def add(
        self, tokens: slice, logits: torch.Tensor, columns: torch.Tensor, here: torch.Tensor
    ) -> None:
        """Add a tile [t, n], which it overwrites; targets as of `Tiles.targets_in`."""
        self.picked[tokens] += torch.where(here, logits.gather(1, columns).squeeze(1), 0.0)
        peak = torch.maximum(self.peak[tokens], logits.amax(1))
        self._rebase(tokens, peak)
        base = peak[:, None] * -self._inverse
        shifted = torch.add(base, logits, alpha=self._inverse, out=logits)
        if not self._entropy:
            self.total[tokens] += shifted.exp_().sum(1)
            return
        if self._spare.numel() < shifted.numel():
            self._spare = torch.empty_like(shifted).flatten()
        exp = torch.exp(shifted, out=self._spare[: shifted.numel()].view_as(shifted))
        self.total[tokens] += exp.sum(1)
        self.weighted[tokens] += exp.mul_(shifted).sum(1)

    def reduce(self, group: ProcessGroup) -> None:
        """The sums over the words of all ranks of the group. A collective."""
        if group.size() == 1 or not len(self.peak):
            return
        self._rebase(slice(None), all_reduce(self.peak, group, dist.ReduceOp.MAX))
        sums = torch.stack([self.total, self.weighted, self.picked])
        self.total, self.weighted, self.picked = all_reduce(sums, group).unbind()

    def _rebase(self, tokens: slice, peak: torch.Tensor) -> None:
        less = (self.peak[tokens] - peak) * self._inverse
        keep, total = less.exp(), self.total[tokens]
        self.weighted[tokens] = keep * (self.weighted[tokens] + less * total)
        self.total[tokens] = keep * total
        self.peak[tokens] = peak


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
        self, tokens: slice, logits: torch.Tensor, columns: torch.Tensor, here: torch.Tensor
    ) -> torch.Tensor:
        """-sign * d loss / d logits [t, n], fp32; it overwrites the logits."""
        grad = torch.add(self._base[tokens], logits, alpha=self._inverse, out=logits)
        if self._factor is None:
            grad = grad.exp_()
        else:
            constant, steep = (part[tokens] for part in self._factor)
            grad = grad.exp().mul_(torch.addcmul(constant, steep, grad))
        return grad.scatter_add_(1, columns, (self._at_target[tokens] * here)[:, None])


def _slices(count: int, step: int) -> list[slice]:
    return [slice(i, min(i + step, count)) for i in range(0, count, step)]
