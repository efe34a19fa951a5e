"""How much a policy gradient varies over mini-batches at fixed weights.

    g_i        gradient of mini-batch i = 1..n, [P]
    g          mean over the mini-batches
    trace      1/(n-1) sum_i |g_i - g|^2 = tr Cov(g_i), unbiased
    signal     |g|^2 - trace/n, unbiased for |E g_i|^2; it may be below 0
    snr        signal / trace

The signal-to-noise ratio does not change if a loss scales its gradient, as gamma < 1 does.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class GradientNoise:
    """The spread of one loss's gradients."""

    mini_batches: int  #: n
    mean_square: float  #: mean of |g_i|^2, for E|g|^2
    square_of_mean: float  #: |g|^2, which is too large by trace/n for |E g|^2
    signal: float  #: unbiased for |E g|^2
    trace: float  #: of the covariance over mini-batches, unbiased
    snr: float  #: signal / trace; nan where nothing varies


class GradientSums:
    """Running sums over mini-batches, in fp64: two vectors' memory whatever their number."""

    def __init__(self) -> None:
        self._first: torch.Tensor | None = None
        self._shifted: torch.Tensor | None = None  #: sum of g_i - g_1
        self._squares = 0.0  #: sum of |g_i - g_1|^2
        self._raw_squares = 0.0  #: sum of |g_i|^2
        self._count = 0

    def add(self, gradient: torch.Tensor) -> None:
        """Add a mini-batch's gradient, [P] of any float type. It is kept from the first one: the
        differences lose no digits where the spread is small beside the mean.
        """
        found = gradient.detach().double()
        if self._first is None:
            self._first, self._shifted = found.clone(), torch.zeros_like(found)
        assert self._shifted is not None, "set with the first"
        difference = found - self._first
        self._shifted += difference
        self._squares += float(difference @ difference)
        self._raw_squares += float(found @ found)
        self._count += 1

    @property
    def mean(self) -> torch.Tensor:
        """g, fp64 [P]. ValueError of none."""
        if self._first is None or self._shifted is None:
            raise ValueError("no gradient was added")
        return self._first + self._shifted / self._count

    def noise(self) -> GradientNoise:
        """The numbers. ValueError of less than two mini-batches."""
        n, mean = self._count, self.mean
        if n < 2:
            raise ValueError(f"{n} mini-batch; expected at least two for a variance")
        assert self._shifted is not None, "there is a mean"
        shift = self._shifted / n
        trace = max(0.0, (self._squares - n * float(shift @ shift)) / (n - 1))
        square = float(mean @ mean)
        signal = square - trace / n
        snr = signal / trace if trace > 0 else math.nan
        return GradientNoise(n, self._raw_squares / n, square, signal, trace, snr)


def cosines(means: Mapping[str, torch.Tensor]) -> dict[str, dict[str, float]]:
    """Cosine of each pair of mean gradients, [P] each; nan where one is 0."""

    def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
        lengths = float(a.norm() * b.norm())
        return float(a @ b) / lengths if lengths > 0 else math.nan

    return {
        name: {other: cosine(mean, against) for other, against in means.items()}
        for name, mean in means.items()
    }
