import dataclasses

import numpy as np
import pytest
import torch
import torch.distributed as dist

from megatron_rl.records import Completion, Prompt, RolloutGroup
from megatron_rl.study.state import NOT_FINITE
from tests.support.host_syncs import HostSyncs
from tests.support.layouts import Case, layout_config, policy_of
from tests.support.ranks import run_on_ranks

EXPERT = "decoder.layers.2.mlp.experts.5.linear_fc2.weight"


@pytest.fixture(scope="module")
def policy():
    with policy_of(layout_config(Case("one", 1, {}, {"freeze_router": True}))) as policy:
        policy.wrapped[0].zero_grad_buffer()
        yield policy


def test_a_finite_step_passes(policy):
    from megatron_rl.policy.finite_checks import check_step, check_weights

    check_step(policy, True, 3.5)
    check_weights(policy)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_the_first_gradient_that_is_not_finite_is_named(policy, bad):
    from megatron_rl.policy.finite_checks import NotFinite, check_step

    gradient = policy.chunks[0].decoder.layers[2].mlp.experts.linear_fc2.weight.main_grad
    gradient[5, 0, 0] = bad
    message = f"norm is {bad}: 1 gradients are not finite, first that of {EXPERT} .rank 0."
    with pytest.raises(NotFinite, match=message):
        check_step(policy, True, bad)
    gradient[5, 0, 0] = 0.0


@pytest.mark.parametrize(("succeeded", "norm"), [(False, 1.0), (True, None), (True, float("nan"))])
def test_a_step_that_failed_without_a_bad_gradient_is_an_error_too(policy, succeeded, norm):
    from megatron_rl.policy.finite_checks import NotFinite, check_step

    with pytest.raises(NotFinite, match=f"the gradient norm is {norm} "):
        check_step(policy, succeeded, norm)


def test_the_first_weight_that_is_not_finite_is_named(policy):
    from megatron_rl.policy.finite_checks import NotFinite, check_weights

    weight = policy.chunks[0].decoder.layers[2].mlp.experts.linear_fc2.weight.data
    kept, weight[5, 0, 0] = float(weight[5, 0, 0]), float("nan")
    with pytest.raises(NotFinite, match=f"1 weights are not finite, first {EXPERT} "):
        check_weights(policy)
    weight[5, 0, 0] = kept


def test_a_value_that_is_not_finite_counts_where_the_mask_is_set():
    from megatron_rl.policy.finite_checks import not_finite

    fine, values = torch.zeros(4), torch.tensor([0.0, float("nan"), 1.0, -float("inf")])
    everywhere = torch.ones(4, dtype=torch.bool)
    masks = [everywhere, torch.tensor([True, False, True, False])]
    assert not_finite("x", [fine, values], masks) is None
    masks = [everywhere, torch.tensor([True, False, False, True])]
    problem = not_finite("x", [fine, values], masks)
    assert problem == "x is not finite at 1 of 2 tokens of a pack, first at 3: -inf"
    assert not_finite("x", [], []) is None


@pytest.mark.parametrize("packs", [1, 7])
def test_finite_values_cost_one_wait_for_the_device(packs):
    from megatron_rl.policy.finite_checks import not_finite

    masks = [torch.ones(4, dtype=torch.bool)] * packs
    with HostSyncs() as syncs:
        assert not_finite("x", [torch.zeros(4)] * packs, masks) is None
    assert syncs.places == {"policy/finite_checks.py: not_finite": 1}


def test_an_answer_with_a_logprob_that_is_not_finite_is_named(policy):
    from megatron_rl.policy.finite_checks import NotFinite, check_answers
    from megatron_rl.rollout.collect import ScoredGroup

    good = Completion(np.array([1, 2]), np.zeros(2, dtype=np.float32), True, "x")
    bad = dataclasses.replace(good, logprobs=np.array([0.0, -np.inf], dtype=np.float32))
    prompts = [Prompt(index, np.array([1]), "p", {}) for index in (4, 9)]
    world, device = policy.groups.world, policy.device.torch_device
    groups = [ScoredGroup(RolloutGroup(prompt, (good, good)), ()) for prompt in prompts]
    check_answers(groups, world, device)
    groups[1] = ScoredGroup(RolloutGroup(prompts[1], (good, bad)), ())
    with pytest.raises(NotFinite, match="not finite in 1 answers, first to problem 9"):
        check_answers(groups, world, device)


def _raised(problems):
    """On a rank: the message it raised with, None if it did not."""
    from megatron_rl.policy.finite_checks import NotFinite, raise_together

    try:
        raise_together(problems[dist.get_rank()], dist.group.WORLD, torch.device("cpu"))
    except NotFinite as error:
        return str(error).split(";")[0]
    return None


@pytest.mark.parametrize(
    ("problems", "message"),
    [
        ((None, None), None),
        ((None, "mine is bad"), "mine is bad (rank 1)"),
        (("first", "second"), "first (rank 0 and 1 more)"),
    ],
)
def test_all_ranks_raise_together_and_name_the_first_problem(problems, message):
    assert run_on_ranks(2, _raised, problems) == [message, message]


def test_a_study_knows_a_run_that_ended_so_by_its_message(policy):
    from megatron_rl.policy import finite_checks

    world, device = policy.groups.world, policy.device.torch_device
    with pytest.raises(finite_checks.NotFinite, match=NOT_FINITE):
        finite_checks.raise_together("a loss is nan", world, device)
