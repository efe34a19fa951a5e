"""Means over seeds with bootstrap intervals, and differences of arms seed by seed. NumPy alone.

The interval is the percentile bootstrap (Efron 1979): seeds are drawn with replacement, as many as
there are, `RESAMPLES` times, and 95% of the means lie in it. The generator starts from the same
seed each time, so the same values always give the same interval.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 10_000
#: A spike: above so many times the median of so many values before it, and of no less than so many.
SPIKE, MEDIAN_OVER, MEDIAN_FROM = 3.0, 20, 3
_SEED = 0
_LOW, _HIGH = 2.5, 97.5
Array = NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds; the bounds are None for a single seed, which has no interval."""

    mean: float
    low: float | None
    high: float | None
    count: int


@dataclass(frozen=True)
class Summary:
    """One run's curve of a metric in numbers."""

    final: float  #: mean over the last steps
    best: float  #: largest mean over as many steps
    area: float  #: area under the curve / its length: the mean over the run
    spikes: int  #: see `spikes`


def estimate(values: Sequence[float]) -> Estimate | None:
    """Mean and 95% interval of the mean of one value a seed, (n,); None of none."""
    if not values:
        return None
    array = np.asarray(values, np.float64)
    mean = float(array.mean())
    if len(array) == 1:
        return Estimate(mean, None, None, 1)
    draws = np.random.default_rng(_SEED).integers(0, len(array), (RESAMPLES, len(array)))
    low, high = np.percentile(array[draws].mean(axis=1), [_LOW, _HIGH])
    return Estimate(mean, float(low), float(high), len(array))


def paired_difference(ours: Mapping[int, float], theirs: Mapping[int, float]) -> Estimate | None:
    """Mean of ours - theirs over the seeds that both have, with its 95% interval; None: no common
    seed. The seeds are drawn, each with both of its values.
    """
    return estimate([ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())])


def band(
    curves: Sequence[tuple[Sequence[int], Sequence[float]]],
) -> tuple[Array, Array, Array, Array]:
    """Steps, means, lows and highs (T,) of one curve a seed, at each step over the seeds that have
    it; where a single one has it, low and high are its value.
    """
    steps = sorted({step for own, _ in curves for step in own})
    table = np.full((len(curves), len(steps)), np.nan)
    places = {step: place for place, step in enumerate(steps)}
    for row, (own, values) in zip(table, curves):
        row[[places[step] for step in own]] = values
    mean, low, high = (np.empty(len(steps)) for _ in range(3))
    present = ~np.isnan(table)
    for pattern in np.unique(present, axis=1).T:
        at = (present == pattern[:, None]).all(axis=0)
        some = table[pattern][:, at]  # (seeds that have these steps, steps)
        mean[at] = some.mean(axis=0)
        draws = np.random.default_rng(_SEED).integers(0, len(some), (RESAMPLES // 10, len(some)))
        weights = np.stack([(draws == seed).mean(axis=1) for seed in range(len(some))], axis=1)
        low[at], high[at] = np.percentile(weights @ some, [_LOW, _HIGH], axis=0)
    return np.asarray(steps, np.float64), mean, low, high


def trailing_means(steps: Sequence[int], values: Sequence[float], window: int) -> list[float]:
    """At each step s the mean of the values at the steps s - window + 1 to s."""
    at, array = np.asarray(steps), np.asarray(values, np.float64)
    first = np.searchsorted(at, at - window, side="right")
    sums = np.concatenate([[0.0], np.cumsum(array)])
    return list((sums[1:] - sums[first]) / (np.arange(len(at)) + 1 - first))


def summary(steps: Sequence[int], values: Sequence[float], window: int) -> Summary | None:
    """A curve in numbers; None of an empty one.

    The area is that under straight lines between the values (trapezoids).
    """
    if not values:
        return None
    means = trailing_means(steps, values, window)
    length = steps[-1] - steps[0]
    area = values[0]
    if length > 0:
        widths = np.diff(np.asarray(steps, np.float64))
        heights = np.asarray(values, np.float64)
        area = float((widths * (heights[1:] + heights[:-1]) / 2).sum() / length)
    return Summary(means[-1], max(means), area, len(spikes(values)))


def spikes(values: Sequence[float]) -> list[int]:
    """The places of values above `SPIKE` x the running median: that of the `MEDIAN_OVER` values
    before, or of as many as there are, at least `MEDIAN_FROM`.
    """
    found = []
    for place in range(MEDIAN_FROM, len(values)):
        before = values[max(0, place - MEDIAN_OVER) : place]
        if values[place] > SPIKE * statistics.median(before):
            found.append(place)
    return found
