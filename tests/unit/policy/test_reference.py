"""The reference weights: swapped in and out without a trace."""

import pytest
import torch

from tests.support.tiny import tiny_config
from tests.support.tiny_training import build_training


def everything(training):
    """Copies of weights, buffers, main weights and moments."""
    state = {
        name: value.clone()
        for name, value in training.chunks[0].state_dict().items()
        if isinstance(value, torch.Tensor)
    }
    state |= {f"main {i}": w for i, w in enumerate(training.main_weights())}
    inner = getattr(training.optimizer, "chained_optimizers", [training.optimizer])
    for number, optimizer in enumerate(inner):
        for index, moments in enumerate(optimizer.optimizer.state.values()):
            state |= {
                f"{number} {index} {name}": value.clone()
                for name, value in moments.items()
                if isinstance(value, torch.Tensor)
            }
    return state


def equal(found, expected):
    assert found.keys() == expected.keys()
    return all(torch.equal(found[name], expected[name]) for name in expected)


CASES = {
    "fp32": {},
    "bf16": {"model": {"dtype": "bf16"}},
    "tied embeddings": {"model": {"tie_embeddings": True}},
    "expert bias": {"model": {"router_score": "sigmoid", "router_expert_bias": True}},
    "distributed optimizer": {"parallel": {"distributed_optimizer": True}},
}


@pytest.mark.parametrize("case", CASES)
def test_the_reference_is_what_was_taken_and_all_comes_back_bit_for_bit(case):
    training = build_training(tiny_config(**CASES[case]))
    from megatron_rl.policy.reference import ReferenceWeights

    reference = ReferenceWeights(training.chunks)
    training.step(1)
    reference.take()
    weights, logits = training.weights(), training.logits()
    training.step(2)
    training.step(3)
    before, moved = everything(training), training.logits()
    assert not torch.equal(moved, logits)
    for _ in range(2):  # the copy survives being swapped out
        with reference.in_place():
            assert equal(training.weights(), weights)
            assert torch.equal(training.logits(), logits)
        assert equal(everything(training), before)
        assert torch.equal(training.logits(), moved)


def test_buffers_belong_to_the_reference():
    training = build_training(tiny_config(**CASES["expert bias"]))
    from megatron_rl.policy.reference import ReferenceWeights

    router = training.chunks[0].decoder.layers[0].mlp.router
    reference = ReferenceWeights(training.chunks)
    reference.take()
    router.expert_bias += 1.0
    with reference.in_place():
        assert router.expert_bias.abs().max() == 0
    assert router.expert_bias.tolist() == [1.0] * len(router.expert_bias)


def test_an_error_inside_brings_the_weights_back():
    training = build_training(tiny_config())
    from megatron_rl.policy.reference import ReferenceWeights

    reference = ReferenceWeights(training.chunks)
    with pytest.raises(RuntimeError, match="never taken"):
        with reference.in_place():
            pass
    reference.take()
    training.step(1)
    before = everything(training)
    with pytest.raises(KeyError):
        with reference.in_place():
            raise KeyError
    assert equal(everything(training), before)


def test_training_goes_on_as_if_nothing_had_happened():
    weights = []
    for with_reference in (False, True):
        training = build_training(tiny_config())
        from megatron_rl.policy.reference import ReferenceWeights

        reference = ReferenceWeights(training.chunks)
        reference.take()
        for number in range(3):
            if with_reference:
                with reference.in_place():
                    training.logits()
            training.step(number)
        weights.append(training.weights())
    assert equal(*weights)
