"""Ratio and gamma of tokens are those that the loss is given, under any layout."""

import functools

import numpy as np
import pytest

from tests.support import layouts
from tests.support.layouts import Case
from tests.support.ranks import run_on_ranks

FIRST = 1  # a sequence's token 0 is predicted by nothing


def _values(case: Case) -> dict:
    """On a rank: by the sequence's tokens, the values kept [2, M - 1] and, of the last mini-batch
    where the loss is computed, what the loss was given at trained positions."""
    from megatron_rl.policy.score import score
    from megatron_rl.policy.token_values import TokenValues
    from megatron_rl.policy.update import update
    from megatron_rl.router.telemetry import RouterTelemetry

    with layouts.policy_of(layouts.layout_config(case)) as policy:
        groups, model = policy.groups, policy.config.model
        samples = layouts.rollout_batch(case)
        batches = layouts.packed_mini_batches(policy, samples)
        share = layouts.SEQUENCES // groups.data.size()
        values, names = TokenValues(policy.device.torch_device), []
        for number, packs in enumerate(batches):
            first = number * layouts.SEQUENCES + groups.data.rank() * share
            mine = samples[first : first + share]
            wanted = {len(names) + i: (i, FIRST) for i in range(share)}
            values.watch(mine, packs, wanted)
            names += [tuple(sample.tokens.tolist()) for sample in mine]
        telemetry = RouterTelemetry(
            model.num_layers, model.num_experts, policy.device.torch_device, floor=0.98
        )
        batches = [score(policy, packs, with_traces=True) for packs in batches]
        kept = functools.partial(update, tokens=values)
        for items in batches:
            _, seen, *_ = layouts.observed_update(policy, items, telemetry, kept)
        given = {"ratio": {}, "gamma": {}}
        for item, inputs in zip(batches[-1], seen):
            ratio = (inputs.logprobs.detach() - inputs.old_logprobs).exp()
            given["ratio"] |= layouts.by_sequence(item.pack, ratio)
            given["gamma"] |= layouts.by_sequence(item.pack, inputs.router_shift)
        kept_values = {names[key]: array for key, array in values.gather(groups).items()}
        return {"kept": kept_values, "given": given}


@functools.cache
def single() -> dict:
    return run_on_ranks(1, _values, Case("one", 1, {}))[0]


def trained(values: np.ndarray, name: tuple) -> np.ndarray:
    (sample,) = [s for s in layouts.rollout_batch(Case("one", 1, {})) if tuple(s.tokens) == name]
    return values[:, sample.trained]


def test_the_values_are_those_of_the_loss():
    found = single()
    assert len(found["kept"]) == 24 and len(found["given"]["ratio"]) == 8
    for name, ratio in found["given"]["ratio"].items():
        kept = trained(found["kept"][name], name)
        np.testing.assert_array_equal(kept[0], ratio)
        np.testing.assert_array_equal(kept[1], found["given"]["gamma"][name])
    # Before the first update nothing has moved; before the last the routers have.
    first = [tuple(s.tokens) for s in layouts.rollout_batch(Case("one", 1, {}))[:8]]
    for name in first:
        np.testing.assert_allclose(trained(found["kept"][name], name), 1.0, atol=1e-5)
    assert min(gamma.min() for gamma in found["given"]["gamma"].values()) < 0.9


@pytest.mark.parametrize(
    ("ranks", "parallel"),
    [
        (2, {"pipeline": 2}),
        (2, {"context": 2}),
        (2, {"expert": 2}),
        pytest.param(2, {"tensor": 2}, marks=pytest.mark.slow),
        pytest.param(4, {"tensor": 2, "pipeline": 2, "expert": 2}, marks=pytest.mark.slow),
        pytest.param(2, {"pipeline": 2, "virtual_pipeline": 2}, marks=pytest.mark.slow),
    ],
    ids=["PP2", "CP2", "EP2", "TP2", "TP2 PP2 EP2", "PP2 VPP2"],
)
def test_every_rank_of_a_replica_has_the_values_of_a_single_process(ranks, parallel):
    results = run_on_ranks(ranks, _values, Case("layout", ranks, parallel))
    expected = single()["kept"]
    split = parallel.get("expert") == 2 and ranks == 2  # the data: each rank has half of it
    assert [len(result["kept"]) for result in results] == [12 if split else 24] * ranks
    for result in results:
        for name, values in result["kept"].items():
            exact = trained(expected[name], name)
            np.testing.assert_allclose(trained(values, name), exact, rtol=2e-3, atol=2e-4)
    assert {name for result in results for name in result["kept"]} == set(expected)
