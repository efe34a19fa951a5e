"""Data ranks with very unequal shares neither hang nor change the result."""

import numpy as np
import pytest
import torch

from tests.support.layout_cases import TOLERANCE, Case
from tests.support.layouts import gathered, layout_config, policy_of, relative
from tests.support.ranks import run_on_ranks

PP2_EP2 = {"pipeline": 2, "expert": 2}
#: Sequence lengths of each of two data ranks, mini-batch by mini-batch: a dozen packs against one,
#: then nothing at all on the first rank.
LENGTHS = ([[40, 31, 38, 25, 44, 29, 33, 40, 36], []], [[3], [2, 9]])
#: With this correction every pack needs the sampler's log-probabilities, empty ones too.
ALGORITHM = {"mismatch": "tis"}


def sample(name, length):
    """A sequence that depends on its place alone."""
    from megatron_rl.records import Sample

    rng = np.random.default_rng(name)
    logprobs = -rng.random(length - 1, dtype=np.float32)
    tokens = rng.integers(0, 128, length)
    return Sample.of(tokens[:1], tokens[1:], float(rng.normal()), logprobs)


def trained(case):
    """On a rank: packs of each mini-batch, metrics and weights after one update on each."""
    with policy_of(layout_config(case)) as policy:
        from megatron_rl.observe.metrics import MetricSums
        from megatron_rl.policy.batch import pack_mini_batches
        from megatron_rl.policy.score import score
        from megatron_rl.policy.update import update
        from megatron_rl.router.telemetry import RouterTelemetry

        device, model = policy.device.torch_device, policy.config.model
        mine = range(2) if policy.groups.data.size() == 1 else [policy.groups.data.rank()]
        batches = [
            [
                sample([rank, number, place], length)
                for rank in mine
                for place, length in enumerate(LENGTHS[rank][number])
            ]
            for number in range(2)
        ]
        packed = pack_mini_batches(batches, policy.config, policy.groups, device)
        scored = [score(policy, packs, with_traces=True) for packs in packed]
        metrics = []
        for items in scored:
            sums = MetricSums(model.num_layers)
            update(policy, items, sums, RouterTelemetry(4, 8, device))
            metrics.append(sums.reduce(policy.groups.world))
        masks = [[int(pack.mask.sum()) for pack in packs] for packs in packed]
        return masks, metrics, gathered(policy, "data")


@pytest.mark.parametrize(
    "name, parallel",
    [
        ("PP2 EP2", PP2_EP2),
        pytest.param("PP2 VPP2 EP2", PP2_EP2 | {"virtual_pipeline": 2}, marks=pytest.mark.slow),
    ],
)
def test_a_rank_with_almost_nothing_keeps_step_with_the_others(name, parallel):
    results = run_on_ranks(4, trained, Case(name, 4, parallel, algorithm=ALGORITHM), timeout_s=90)
    ((_, metrics, weights),) = run_on_ranks(1, trained, Case("one", 1, {}, algorithm=ALGORITHM))
    masks = [result[0] for result in results]
    assert len({tuple(map(len, of_rank)) for of_rank in masks}) == 1  # as many packs on all ranks
    assert sorted({sum(of_rank[0]) for of_rank in masks}) == [2, 307]
    assert sorted({sum(of_rank[1]) for of_rank in masks}) == [0, 9]
    names = set()
    for _, found, some_weights in results:
        for got, want in zip(found, metrics, strict=True):
            for key in ("loss", "grad_norm", "router/raw_gamma_mean"):
                assert got[key] == pytest.approx(want[key], rel=TOLERANCE), key
        for weight, value in some_weights.items():
            assert relative(value, weights[weight]) < TOLERANCE, weight
        names |= set(some_weights)
    assert names == set(weights)
    assert torch.isfinite(torch.tensor([m["loss"] for m in metrics])).all()
