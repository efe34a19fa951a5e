"""When the sampler's numbers count as those of a scoring pass."""

import math

import pytest
import torch


@pytest.mark.parametrize(
    ("numbers", "agrees"),
    [
        # largest differences; tokens, those off; choices, those off, those with other experts
        ((1e-5, 1e-5, 100, 0, 200, 0, 0), True),
        ((2e-4, 1e-5, 1000, 1, 2000, 0, 0), False),
        ((1e-5, 2e-4, 1000, 0, 2000, 1, 0), False),
        ((2e-3, 2e-3, 1000, 10, 2000, 20, 1), True),  # what follows a near tie
        ((2e-3, 1e-5, 1000, 11, 2000, 1, 1), False),
        ((1e-5, 1e-5, 1000, 0, 2000, 21, 21), False),
        ((math.inf, 1e-5, 1000, 1, 2000, 0, 0), False),
        ((0.0, 0.0, 0, 0, 0, 0, 0), True),
    ],
)
def test_agreement(numbers, agrees):
    from megatron_rl.policy.sampler_scores import Agreement

    assert Agreement(*numbers).agrees == agrees


def test_a_layer_is_compared_where_its_rows_predict_trained_tokens():
    from megatron_rl.policy.sampler_scores import _compare_layer
    from megatron_rl.router.trace import LayerTrace

    ids = torch.tensor([[0, 1], [1, 2], [0, 3], [2, 3], [0, 1]], dtype=torch.uint8)
    logprobs = torch.full((5, 2), -1.0)
    other_ids, other = ids.clone(), logprobs.clone()
    other_ids[1] = torch.tensor([1, 3])  # other experts: their log-probabilities are no difference
    other[1] -= 0.5
    other[2, 1] -= 0.25  # off
    other[3, 0] = float("nan")  # predicts nothing
    other[4, 0] += 1e-6
    trained = torch.tensor([True, True, True, False, True])
    largest, counts = _compare_layer(
        LayerTrace(ids, logprobs), LayerTrace(other_ids, other), trained
    )
    assert float(largest) == 0.25 and counts.tolist() == [4, 2, 1]
    other[0, 0] = float("nan")
    largest, counts = _compare_layer(
        LayerTrace(ids, logprobs), LayerTrace(other_ids, other), trained
    )
    assert float(largest) == math.inf and counts.tolist() == [4, 3, 1]
