"""The spread of gradients, by numbers worked out by hand."""

import math

import pytest
import torch

from megatron_rl.algorithms.gradient_noise import GradientSums, cosines


def sums(rows, dtype=torch.float32):
    found = GradientSums()
    for row in rows:
        found.add(torch.tensor(row, dtype=dtype))
    return found


def test_three_gradients_by_hand():
    """Mean (2, 1); squared distances from it 2, 2 and 4; squared lengths 1, 9 and 13."""
    found = sums([[1.0, 0.0], [3.0, 0.0], [2.0, 3.0]])
    assert found.mean.tolist() == [2.0, 1.0]
    noise = found.noise()
    assert noise.mini_batches == 3
    assert noise.trace == pytest.approx(8 / 2)
    assert noise.mean_square == pytest.approx(23 / 3)
    assert noise.square_of_mean == pytest.approx(5)
    assert noise.signal == pytest.approx(5 - 4 / 3)
    assert noise.snr == pytest.approx((5 - 4 / 3) / 4)


def test_a_scale_leaves_the_ratio_and_squares_the_rest():
    rows = [[1.0, -2.0], [0.5, 4.0], [3.0, 0.25]]
    one, ten = sums(rows).noise(), sums([[10 * v for v in row] for row in rows]).noise()
    assert ten.snr == pytest.approx(one.snr)
    for name in ("trace", "signal", "mean_square"):
        assert getattr(ten, name) == pytest.approx(100 * getattr(one, name))


def test_equal_gradients_have_no_noise():
    noise = sums([[3.0, 4.0]] * 3).noise()
    assert (noise.trace, noise.signal, noise.mean_square) == (0.0, 25.0, 25.0)
    assert math.isnan(noise.snr)


def test_a_small_spread_beside_a_large_mean_loses_no_digits():
    noise = sums([[1e9 + k, 0.0] for k in (0, 1, 2)], torch.float64).noise()
    assert noise.trace == pytest.approx(1.0, rel=1e-12)


def test_the_estimates_are_unbiased():
    """Of N(mu, I) in 50 dimensions with |mu|^2 = 2: trace 50, signal 2 (|mean|^2 alone: 14.5)."""
    generator = torch.Generator().manual_seed(3)
    mu = torch.zeros(50, dtype=torch.float64)
    mu[:2] = 1.0
    found = []
    for _ in range(400):
        rows = mu + torch.randn(4, 50, generator=generator, dtype=torch.float64)
        one = GradientSums()
        for row in rows:
            one.add(row)
        found.append(one.noise())
    assert sum(n.trace for n in found) / 400 == pytest.approx(50, rel=0.02)
    assert sum(n.signal for n in found) / 400 == pytest.approx(2, abs=0.8)
    assert sum(n.square_of_mean for n in found) / 400 == pytest.approx(14.5, abs=0.8)


def test_a_variance_takes_two():
    with pytest.raises(ValueError, match="no gradient was added"):
        GradientSums().noise()
    with pytest.raises(ValueError, match="1 mini-batch; expected at least two"):
        sums([[1.0]]).noise()


def test_cosines_of_pairs():
    means = {"a": torch.tensor([3.0, 0.0]), "b": torch.tensor([1.0, 1.0]), "c": torch.zeros(2)}
    found = cosines(means)
    assert found["a"]["b"] == found["b"]["a"] == pytest.approx(math.sqrt(0.5))
    assert found["a"]["a"] == pytest.approx(1.0)
    assert math.isnan(found["a"]["c"])
