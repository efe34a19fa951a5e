"""When weights travel between expert-parallel ranks, and in which passes."""

import dataclasses
import math
from unittest import mock

import pytest
import torch

from tests.support.ranks import run_on_ranks
from tests.support.tiny import cpu_device, tiny_config

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def megatron():
    cpu_device()


def _plans(parallel, spares, kind="cpu", model=()):
    """On a rank: the plan where rank r can spare ``spares[r]`` bytes."""
    import torch.distributed as dist

    from tests.support.tiny import prepared_device

    prepared_device("cpu")
    from megatron.core import parallel_state

    from megatron_rl.parallel.groups import build_groups, destroy_groups
    from megatron_rl.policy.expert_exchange import exchange_plan

    if parallel_state.model_parallel_is_initialized():
        destroy_groups()
    config = tiny_config(parallel=parallel, model=dict(model))
    groups = build_groups(config.parallel)
    plan = exchange_plan(config, groups, torch.device(kind), spares[dist.get_rank()])
    return dataclasses.astuple(plan)


NEVER = (math.inf, math.inf)
EP2 = {"expert": 2}
#: 4 experts of 3 matrices of 32 x 32 in 2 layers: copies of 4 bytes a weight, gradients of 8
NEEDED = 4 * 3 * 32 * 32 * 2 * 12


@pytest.mark.parametrize(
    ("parallel", "spares", "expected"),
    [
        (EP2, [0, 0], NEVER),
        (EP2, [NEEDED, NEEDED - 1], NEVER),
        ({**EP2, "expert_exchange": "tokens"}, [NEEDED, NEEDED], NEVER),
        ({**EP2, "dispatcher": "allgather"}, [NEEDED, NEEDED], NEVER),
        ({**EP2, "expert_exchange": "weights"}, [0, 0], (0, 0)),
        ({}, [NEEDED, NEEDED], NEVER),
    ],
)
def test_plans(parallel, spares, expected):
    assert run_on_ranks(2, _plans, parallel, spares) == [expected] * 2


def test_on_cuda_tokens_travel():
    assert run_on_ranks(2, _plans, EP2, [NEEDED] * 2, "cuda") == [NEVER] * 2


BIG = {"num_experts": 64, "moe_ffn_hidden_size": 512, "hidden_size": 256}
#: numbers of a layer's experts
MATRICES = 64 * 3 * 512 * 256


@pytest.mark.parametrize(
    ("parallel", "update", "score"),
    [
        # half of everything stays: 2 ways of 2 experts; 7 messages against 4, 4 against 2
        (
            EP2,
            (MATRICES * 8 / 2 - 3 * 2**20) / (2 * 2 * 256 * 4 * 2 / 2),
            (MATRICES * 4 / 2 - 2 * 2**20) / (2 * 2 * 256 * 4 / 2),
        ),
        # all rows to the other slice of their experts and back
        (
            {"expert_tensor": 2},
            (MATRICES * 8 / 2 - 3 * 2**20) / (2 * 2 * 256 * 4 * 2),
            (MATRICES * 4 / 2 - 2 * 2**20) / (2 * 2 * 256 * 4),
        ),
    ],
)
def test_where_weights_begin_to_cost_less(parallel, update, score):
    for found in run_on_ranks(2, _plans, parallel, [10**12] * 2, "cpu", BIG):
        assert found == (math.ceil(update), math.ceil(score))


def test_in_bf16_gradients_still_weigh_four_bytes():
    plans = run_on_ranks(2, _plans, EP2, [10**12] * 2, "cpu", {**BIG, "dtype": "bf16"})
    update = (MATRICES * 6 / 2 - 3 * 2**20) / (2 * 2 * 256 * 2 * 2 / 2)
    score = (MATRICES * 2 / 2 - 2 * 2**20) / (2 * 2 * 256 * 2 / 2)
    assert plans == [(math.ceil(update), math.ceil(score))] * 2


def test_few_small_experts_always_travel():
    assert run_on_ranks(2, _plans, EP2, [NEEDED, NEEDED]) == [(0, 0)] * 2


@pytest.mark.parametrize(
    ("rows", "text"),
    [
        (NEVER, ""),
        ((0, 0), "weights travel between ranks, tokens stay"),
        (
            (1536, 0),
            "weights travel between ranks and tokens stay where that is less: in updates of "
            "1,536 rows of a rank or more, scoring of 0",
        ),
    ],
)
def test_text(rows, text):
    from megatron_rl.policy.expert_exchange import ExchangePlan

    assert ExchangePlan(*rows).text() == text


def _passes(update_rows, score_rows):
    """On a rank: how often the weights were gathered in a scoring pass over all packs and in the
    updates, and the rows of a rank in these passes.
    """
    from tests.support.layout_cases import Case
    from tests.support.layouts import (
        layout_config,
        observed_update,
        packed_mini_batches,
        policy_of,
        rollout_batch,
    )

    case = Case("", 2, {"tensor": 2, "expert": 2, "expert_exchange": "weights"})
    with policy_of(layout_config(case)) as policy:
        from megatron_rl.models.expert_weights import ExpertWeights
        from megatron_rl.policy.expert_exchange import ExchangePlan
        from megatron_rl.policy.score import score
        from megatron_rl.policy.update import update
        from megatron_rl.router.telemetry import RouterTelemetry

        policy.exchange.plan = ExchangePlan(update_rows, score_rows)
        model = policy.config.model
        telemetry = RouterTelemetry(model.num_layers, model.num_experts, CPU)
        batches = packed_mini_batches(policy, rollout_batch(case))
        flat = [pack for packs in batches for pack in packs]
        rows = [sum(len(pack.row) for pack in packs) // 2 for packs in (flat, batches[0])]
        with mock.patch.object(
            ExpertWeights, "gathered", autospec=True, side_effect=ExpertWeights.gathered
        ) as gathered:
            scored = score(policy, flat, with_traces=True)
            in_scoring = gathered.call_count
            items = scored[: len(batches[0])]
            scalars, _, _ = observed_update(policy, items, telemetry, update)
            in_update = gathered.call_count - in_scoring
        return in_scoring, in_update, rows, scalars["grad_norm"]


def test_each_pass_goes_by_its_own_rows():
    never = run_on_ranks(2, _passes, math.inf, math.inf)
    (_, _, (scored, updated), norm), *_ = never
    assert scored > updated > 0
    assert {found[:2] for found in never} == {(0, 0)}
    for update_rows, score_rows, expected in [
        (updated, scored + 1, (0, 1)),
        (updated + 1, scored, (1, 0)),
    ]:
        for *times, _, found in run_on_ranks(2, _passes, update_rows, score_rows):
            assert tuple(times) == expected
            assert found == pytest.approx(norm, rel=1e-5)


def test_experts_that_are_not_ours_are_refused():
    from megatron_rl.errors import UserError
    from megatron_rl.policy.expert_exchange import ExchangePlan, ExpertExchange
    from tests.support.tiny import build_tiny

    groups, _, chunks = build_tiny(tiny_config())
    chunks[0].decoder.layers[1].mlp.experts = torch.nn.Identity()
    with pytest.raises(UserError, match="weights with Transformer Engine's experts"):
        ExpertExchange(ExchangePlan(0, 0), chunks, [], groups)
    ExpertExchange(ExchangePlan(), chunks, [], groups)  # tokens go to any experts
