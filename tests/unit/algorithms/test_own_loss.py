"""A user's own loss with the formula of ours: the same bits."""

import pytest
import torch

from megatron_rl.algorithms import LOSSES, make_settings
from megatron_rl.catalogue import kinds
from megatron_rl.catalogue.find import find
from megatron_rl.catalogue.read import read_settings
from tests.support.loss_batches import loss_and_gradient, random_batch
from tests.support.runs import ROOT


@pytest.mark.parametrize("seed", range(8))
def test_the_loss_of_the_example_is_grpo_to_the_bit(seed):
    row = find(kinds.LOSSES, f"{ROOT}/examples/extend/my_loss.py:my_loss")
    settings = read_settings("algorithm.settings", "it", row.settings, {"clip": 0.3})
    ours = make_settings("grpo", {"clip_low": 0.3, "clip_high": 0.3})
    inputs = random_batch(seed, 5)
    mine = row.bind(settings)(inputs)
    assert mine.metrics["cut"][0] > 0 or seed  # some ratios are clipped
    value, gradient = loss_and_gradient(mine, inputs)
    inputs = random_batch(seed, 5)
    other, expected = loss_and_gradient(LOSSES["grpo"](inputs, ours), inputs)
    assert value == other and torch.equal(gradient, expected)
    assert gradient.abs().max() > 0
