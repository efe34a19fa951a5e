"""Clip fractions by quartile of gamma: numbers by hand, and sorted tokens as the judge."""

import pytest
import torch

from megatron_rl.router.clip_split import NUM_BINS, ClipSplit, quartile_fractions

CPU = torch.device("cpu")


def split(distance, clipped, mask=None):
    tokens = torch.tensor(distance, dtype=torch.float32)
    counted = torch.ones(len(tokens), dtype=torch.bool) if mask is None else torch.tensor(mask)
    found = ClipSplit(CPU)
    found.add(tokens, torch.tensor(clipped), counted)
    return found


def test_a_token_in_each_quartile():
    # Delta 2: gamma 0.14 is the smallest, so it is the first quarter.
    found = split([0.0, 2.0, 0.5, 0.01], [True, True, False, False])
    assert quartile_fractions(found.counts) == [1.0, 0.0, 0.0, 1.0]


def test_a_bin_that_spans_quartiles_shares_its_clipped_tokens_out():
    # Six tokens at 0 of which three are clipped, two at 1 of which two are.
    found = split([0.0] * 6 + [1.0] * 2, [True, False] * 3 + [True] * 2)
    assert quartile_fractions(found.counts) == pytest.approx([1.0, 0.5, 0.5, 0.5])
    # Three at 1 (all clipped), five at 0 (none): the first quarter has two, the second one and one.
    found = split([1.0] * 3 + [0.0] * 5, [True] * 3 + [False] * 5)
    assert quartile_fractions(found.counts) == pytest.approx([1.0, 0.5, 0.0, 0.0])


def test_masked_tokens_do_not_count_and_without_a_token_there_is_nothing():
    found = split([3.0, 0.1, 0.0], [True, True, False], [False, True, True])
    assert quartile_fractions(found.counts) == [1.0, 1.0, 0.0, 0.0]
    assert quartile_fractions(ClipSplit(CPU).counts) == []


def test_extreme_distances_fall_into_the_outer_bins():
    found = split([1e-30, 1e30, 0.0, float("inf")], [False] * 4)
    assert found.counts[0].nonzero().flatten().tolist() == [0, 1, NUM_BINS - 1]
    assert found.counts[0, [0, 1, NUM_BINS - 1]].tolist() == [1, 1, 2]


def test_histograms_of_any_packs_add_up_to_the_quartiles_of_the_sorted_tokens():
    generator = torch.Generator().manual_seed(3)
    # Apart by more than a bin, so that no bin holds two different distances.
    distance = 2.0 ** (-torch.randint(0, 12, (400,), generator=generator).float())
    clipped = torch.rand(400, generator=generator) < distance
    found = ClipSplit(CPU)
    for rows in torch.randperm(400, generator=generator).split(37):
        found.add(distance[rows], clipped[rows], torch.ones(len(rows), dtype=torch.bool))
    # Within equal distances the clipped tokens are spread evenly: a rate for each of them.
    rate = torch.stack([clipped[distance == d].double().mean() for d in distance])
    ordered = rate[distance.argsort(descending=True)]
    expected = [quarter.mean().item() for quarter in ordered.chunk(4)]
    assert quartile_fractions(found.counts) == pytest.approx(expected)
    assert expected[0] > expected[3]
