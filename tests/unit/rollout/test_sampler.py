"""The sampler against a slow reference, by hand, and by counting."""

import numpy as np
import pytest
import torch

from megatron_rl.rollout.builtin import sampler
from megatron_rl.rollout.builtin.sampler import invert_cdf, sample, truncated, uniforms
from megatron_rl.rollout.engine import SamplingSettings


def settings(**fields):
    return SamplingSettings(samples=1, max_new_tokens=1, **fields)


def slow_distribution(logits, temperature, top_k, top_p):
    """One row -> (probabilities that are sampled from, log-probabilities that are returned)."""
    scaled = [x / temperature for x in logits]
    peak = max(scaled)
    total = sum(np.exp(x - peak) for x in scaled)
    logprobs = [x - peak - np.log(total) for x in scaled]
    order = sorted(range(len(logits)), key=lambda v: -logprobs[v])
    kept = order[: top_k or len(order)]
    mass = sum(np.exp(logprobs[v]) for v in kept)
    nucleus, reached = [], 0.0
    for v in kept:
        if reached >= top_p * mass and nucleus:
            break
        nucleus.append(v)
        reached += np.exp(logprobs[v])
    probs = [np.exp(logprobs[v]) / reached if v in nucleus else 0.0 for v in range(len(logits))]
    return np.array(probs), np.array(logprobs)


def slow_draw(probs, uniform):
    reached = 0.0
    for token, p in enumerate(probs):
        reached += p
        if p > 0 and uniform < reached:
            return token
    return int(np.flatnonzero(probs)[-1])


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
@pytest.mark.parametrize(
    "top_k, top_p", [(0, 1.0), (5, 1.0), (0, 0.7), (7, 0.6), (1, 1.0), (0, 1e-6)]
)
def test_sample_matches_the_slow_reference(temperature, top_k, top_p):
    generator = np.random.default_rng(3)
    logits = generator.normal(size=(200, 30)).astype(np.float32) * 2
    uniform = generator.random(200)
    tokens, logprobs = sample(
        torch.tensor(logits),
        torch.tensor(uniform),
        settings(temperature=temperature, top_k=top_k, top_p=top_p),
    )
    for row in range(200):
        probs, reference = slow_distribution(logits[row].astype(float), temperature, top_k, top_p)
        assert tokens[row] == slow_draw(probs, uniform[row])
        assert logprobs[row].item() == pytest.approx(reference[tokens[row]], abs=2e-6)


def test_frequencies_are_the_probabilities():
    logits = torch.tensor([2.0, 0.5, -1.0, 1.0, -4.0])
    count = 40_000
    uniform = torch.tensor(uniforms(5, [(0, 0)], count)[0])
    tokens, _ = sample(logits.expand(count, 5), uniform, settings(temperature=1.3, top_p=0.9))
    probs, _ = slow_distribution(logits.double().numpy(), 1.3, 0, 0.9)
    observed = np.bincount(tokens.numpy(), minlength=5) / count
    assert (probs == 0).sum() == 2 and (observed[probs == 0] == 0).all()
    assert np.abs(observed - probs).max() < 4 * np.sqrt(0.25 / count)


def test_truncated_by_hand():
    probs = torch.tensor([[0.1, 0.4, 0.2, 0.3]])
    kept = lambda *arguments: (truncated(probs, *arguments)[0] > 0).tolist()  # noqa: E731
    assert kept(2, 1.0) == [False, True, False, True]
    assert kept(0, 0.65) == [False, True, False, True]  # 0.4 + 0.3 reaches 0.65
    assert kept(0, 0.75) == [False, True, True, True]
    # Of the three left by top-k (0.4, 0.3, 0.2 of 0.9), 0.7 / 0.9 reaches 0.75.
    assert kept(3, 0.75) == [False, True, False, True]
    assert kept(9, 1.0) == [True, True, True, True]


def test_tokens_as_likely_as_the_last_one_are_kept():
    probs = torch.tensor([[0.25, 0.25, 0.25, 0.25]])
    assert (truncated(probs, 1, 1.0) > 0).all()
    assert (truncated(probs, 0, 0.3) > 0).all()


def test_greedy_takes_the_first_of_the_likeliest_and_its_log_probability_at_the_temperature():
    logits = torch.tensor([[1.0, 3.0, 3.0], [0.0, -1.0, -2.0]])
    tokens, logprobs = sample(logits, None, settings(greedy=True, temperature=2.0, top_k=1))
    assert tokens.tolist() == [1, 0]
    expected = [-np.log(2 + np.exp(-1.0)), -np.log(1 + np.exp(-0.5) + np.exp(-1.0))]
    np.testing.assert_allclose(logprobs.numpy(), expected, atol=1e-6)


@pytest.mark.parametrize("uniform", [0.0, 0.3, 0.5, 1 - 2**-53])
def test_a_token_without_probability_is_never_drawn(uniform):
    probs = torch.tensor([[0.0, 0.1, 0.0, 0.2, 0.0], [0.0, 0.0, 0.0, 1.0, 0.0]])
    tokens = invert_cdf(probs, torch.tensor([uniform, uniform], dtype=torch.float64))
    assert tokens.tolist() == [1 if uniform < 0.33 else 3, 3]


@pytest.mark.parametrize("vocabulary", [1, 63, 64, 65, 128, 1000])
def test_sums_in_two_levels_find_the_token_of_one_running_sum(vocabulary):
    """Also where whole blocks have no probability, and at the ends of blocks."""
    generator = np.random.default_rng(vocabulary)
    probs = generator.integers(0, 5, (300, vocabulary)).astype(float)  # sums are exact
    probs[:, 64:256] *= generator.integers(0, 2, (300, 1))
    probs[:, generator.integers(vocabulary)] = 1.0
    ends = probs.cumsum(1)
    point = np.floor(generator.random(300) * ends[:, -1])  # many are a token's end
    found = invert_cdf(torch.tensor(probs).float(), torch.tensor(point / ends[:, -1]))
    # what the division and the product round to
    point = point / ends[:, -1] * ends[:, -1]
    expected = [np.searchsorted(row, at, side="right") for row, at in zip(ends, point)]
    assert found.tolist() == expected
    assert (probs[np.arange(300), expected] > 0).all()


def test_rounding_up_to_the_total_gives_the_last_token_with_probability():
    probs = torch.tensor([[0.25, 0.5, 0.0]])
    assert invert_cdf(probs, torch.tensor([1.0], dtype=torch.float64)).tolist() == [1]


def test_long_batches_go_through_in_chunks(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(10, 7, generator=generator)
    uniform = torch.rand(10, generator=generator, dtype=torch.float64)
    whole = sample(logits, uniform, settings())
    monkeypatch.setattr(sampler, "CHUNK_ELEMENTS", 3 * 7)
    in_chunks = sample(logits, uniform, settings())
    assert torch.equal(whole[0], in_chunks[0]) and torch.equal(whole[1], in_chunks[1])


def test_an_empty_batch_gives_no_tokens():
    tokens, logprobs = sample(torch.zeros(0, 7), torch.zeros(0, dtype=torch.float64), settings())
    assert tokens.shape == logprobs.shape == (0,)


def test_uniforms_belong_to_the_sequence():
    both = uniforms(7, [(3, 0), (3, 1)], 6)
    np.testing.assert_array_equal(uniforms(7, [(9, 9), (3, 1)], 6)[1], both[1])
    np.testing.assert_array_equal(uniforms(7, [(3, 0)], 4)[0], both[0, :4])
    others = [uniforms(*names, 6)[0] for names in ((8, [(3, 0)]), (7, [(0, 3)]), (7, [(3, 1)]))]
    for other in others:
        assert len(np.intersect1d(other, both[0])) == 0
    assert (both >= 0).all() and (both < 1).all()


@pytest.mark.parametrize("top_k, top_p", [(5, 1.0), (0, 0.7), (7, 0.6), (1, 1.0), (0, 1.0)])
def test_kept_tokens_are_those_that_are_drawn_from_and_log_probabilities_are_over_them(
    top_k, top_p, monkeypatch
):
    monkeypatch.setattr(sampler, "CHUNK_ELEMENTS", 30 * 64)  # in several chunks
    generator = np.random.default_rng(4)
    logits = generator.normal(size=(200, 30)).astype(np.float32) * 2
    uniform = torch.tensor(generator.random(200))
    wanted = settings(temperature=0.8, top_k=top_k, top_p=top_p)
    kept = torch.zeros(200, 30, dtype=torch.bool)
    tokens, logprobs = sample(torch.tensor(logits), uniform, wanted, kept)
    assert torch.equal(tokens, sample(torch.tensor(logits), uniform, wanted)[0])
    for row in range(200):
        probs, _ = slow_distribution(logits[row].astype(float), 0.8, top_k, top_p)
        assert kept[row].tolist() == (probs > 0).tolist()
        assert logprobs[row].item() == pytest.approx(np.log(probs[tokens[row]]), abs=2e-6)


@pytest.mark.parametrize("vocabulary", [1, 40, 64, 100, 128])
def test_numbers_that_are_not_finite_give_tokens_that_exist(vocabulary):
    probs = torch.full((2, vocabulary), float("nan"))
    probs[1] = 1.0
    tokens = invert_cdf(probs, torch.full((2,), 0.5, dtype=torch.float64))
    assert tokens.tolist() == [vocabulary - 1, vocabulary // 2]
