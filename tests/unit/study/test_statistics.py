"""Means and intervals against the whole bootstrap distribution; numbers worked out by hand."""

import itertools
import math

import numpy as np
import pytest

from megatron_rl.study.statistics import (
    Estimate,
    Summary,
    band,
    estimate,
    paired_difference,
    spikes,
    summary,
    trailing_means,
)


def whole_bootstrap(values):
    """The mean of every one of the n^n samples, sorted."""
    return sorted(map(np.mean, itertools.product(values, repeat=len(values))))


def mass_below(means, bound):
    return np.mean(np.asarray(means) <= bound + 1e-12)


@pytest.mark.parametrize("values", [[0.1, 0.5], [1.0, 2.0, 4.0], [0.3, 0.9, 0.2, 0.6, 0.1]])
def test_the_interval_is_that_of_all_samples_with_replacement(values):
    found, means = estimate(values), whole_bootstrap(values)
    assert found.mean == pytest.approx(sum(values) / len(values), abs=1e-15)
    # 10,000 draws find a percentile to within half a percent of the mass
    assert mass_below(means, found.low) >= 0.02 and mass_below(means, found.low - 1e-9) <= 0.03
    assert mass_below(means, found.high) >= 0.97 and mass_below(means, found.high - 1e-9) <= 0.98


def test_known_intervals():
    """Two seeds: the means 0, 1/2, 1 have the masses 1/4, 1/2, 1/4. Ten seeds, one of which is
    one: the share of ones is binomial, P(0) = 0.35, P(X <= 2) = 0.930, P(X <= 3) = 0.987.
    """
    assert estimate([0.0, 1.0]) == Estimate(0.5, 0.0, 1.0, 2)
    found = estimate([0.0] * 9 + [1.0])
    assert (found.low, found.high) == (0.0, pytest.approx(0.3))
    assert estimate([0.7]) == Estimate(0.7, None, None, 1)
    assert estimate([]) is None


def test_the_same_values_give_the_same_interval():
    assert estimate([0.1, 0.4, 0.2]) == estimate([0.1, 0.4, 0.2])


def test_differences_are_taken_seed_by_seed():
    """The arms differ by 0.1 for each seed, though the seeds differ by much more."""
    ours, theirs = {1: 0.2, 2: 0.9, 5: 0.5}, {1: 0.1, 2: 0.8, 3: 0.0, 5: 0.4}
    found = paired_difference(ours, theirs)
    assert found.count == 3
    assert (found.mean, found.low, found.high) == pytest.approx((0.1, 0.1, 0.1))
    assert paired_difference({1: 0.5}, {2: 0.5}) is None


def test_trailing_means_count_steps_not_values():
    steps, values = [0, 10, 11, 12, 20], [1.0, 2.0, 4.0, 6.0, 9.0]
    assert trailing_means(steps, values, 1) == values
    assert trailing_means(steps, values, 2) == [1.0, 2.0, 3.0, 5.0, 9.0]
    assert trailing_means(steps, values, 11) == [1.0, 1.5, 3.0, 4.0, 5.25]


def test_a_curve_in_numbers():
    """Trapezoids: 2 steps of mean 1.5, one of 3, 2 of 3: 3 + 3 + 6 over 5 steps."""
    steps, values = [1, 3, 4, 6], [1.0, 2.0, 4.0, 2.0]
    assert summary(steps, values, 1) == Summary(final=2.0, best=4.0, area=12 / 5, spikes=0)
    assert summary(steps, values, 3) == Summary(final=3.0, best=3.0, area=12 / 5, spikes=0)
    assert summary([4], [0.25], 10) == Summary(0.25, 0.25, 0.25, 0)
    assert summary([], [], 10) is None


def test_a_band_is_the_interval_at_each_step_over_the_seeds_that_have_it():
    first, second = ([1, 2, 3], [0.0, 0.2, 0.4]), ([1, 2], [1.0, 0.2])
    steps, mean, low, high = band([first, second])
    assert steps.tolist() == [1, 2, 3]
    assert mean.tolist() == pytest.approx([0.5, 0.2, 0.4])
    assert low.tolist() == pytest.approx([0.0, 0.2, 0.4])
    assert high.tolist() == pytest.approx([1.0, 0.2, 0.4])


def test_a_wide_band_agrees_with_the_interval_of_each_step():
    generator = np.random.default_rng(5)
    table = generator.normal(size=(6, 40))
    steps = list(range(40))
    _, mean, low, high = band([(steps, row.tolist()) for row in table])
    for step in steps:
        found = estimate(table[:, step].tolist())
        assert mean[step] == pytest.approx(found.mean)
        width = found.high - found.low
        assert math.isclose(low[step], found.low, abs_tol=0.1 * width)
        assert math.isclose(high[step], found.high, abs_tol=0.1 * width)


def test_spikes_stand_out_of_the_steps_before_them():
    assert spikes([1.0, 1.0, 9.0, 9.0]) == [3]  # three values are before it, their median is 1
    assert spikes([1.0, 2.0, 3.0, 6.0, 6.1, 7.51]) == []  # medians 2, 2.5, 3
    assert spikes([1.0, 2.0, 3.0, 6.01, 7.6, 0.1]) == [3, 4]
    level = [1.0] * 20 + [10.0] * 20  # from its eleventh on the median is not 1 any more
    assert spikes([*level, 31.0]) == [*range(20, 30), 40]
    assert spikes([5.0, 50.0]) == []
