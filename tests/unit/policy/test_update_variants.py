"""The variants of the algorithm through scoring and update on one rank, against the equations."""

import contextlib
import math

import pytest
import torch

from tests.support.layouts import (
    Case,
    layout_config,
    packed_mini_batches,
    policy_of,
    rollout_batch,
)
from tests.support.slow_losses import slow_loss, slow_regularisers


@contextlib.contextmanager
def scored(parallel=None, **algorithm):
    """(policy, scored mini-batches) of the fixed rollout batch; a reference where one is asked."""
    case = Case("one", 1, parallel or {}, algorithm=algorithm)
    with policy_of(layout_config(case)) as policy:
        from megatron_rl.policy.score import score, score_reference

        packs = packed_mini_batches(policy, rollout_batch(case))
        flat = score(policy, [pack for batch in packs for pack in batch], with_traces=True)
        if policy.reference is not None:
            policy.reference.take()
            flat = score_reference(policy, flat)
        size = len(packs[0])
        yield policy, [flat[i : i + size] for i in range(0, len(flat), size)]


def one_update(policy, items):
    """(metrics, loss inputs of each pack)."""
    from unittest import mock

    from megatron_rl.catalogue.find import find
    from megatron_rl.catalogue.kinds import LOSSES
    from megatron_rl.observe.metrics import MetricSums
    from megatron_rl.policy.update import update
    from megatron_rl.router.telemetry import RouterTelemetry

    name, seen = policy.config.algorithm.name, []
    row = find(LOSSES, name)
    loss = row.load()

    def spy(inputs, settings):
        if inputs.logprobs.requires_grad:
            seen.append(inputs)
        return loss(inputs, settings)

    sums = MetricSums(policy.config.model.num_layers)
    telemetry = RouterTelemetry(4, 8, torch.device("cpu"))
    with mock.patch(row.code.replace(":", "."), spy):
        update(policy, items, sums, telemetry)
    return sums.reduce(), seen


def joined(seen, name):
    """A field of all packs, in one list."""
    return torch.cat([getattr(inputs, name).detach().double() for inputs in seen])


def loops(seen, name, settings, mode):
    """The loss of a mini-batch by loops: of all packs, divided once."""
    total, count = 0.0, 0
    for inputs in seen:
        part, number = slow_loss(
            name,
            inputs.logprobs.detach().double(),
            inputs.old_logprobs.double().tolist(),
            inputs.advantages.double().tolist(),
            inputs.mask.tolist(),
            inputs.sequence_ids.tolist(),
            settings,
            inputs.router_shift.double().tolist(),
            mode,
            None if inputs.sampler_weights is None else inputs.sampler_weights.tolist(),
        )
        total, count = total + part.item(), count + number
    return total / count


def test_sampler_weights_penalty_and_bonus_are_the_equations():
    algorithm = {
        "name": "rspo",
        "mismatch": "tis",
        "mismatch_high": 0.05,
        "kl_coef": 2.0,
        "kl_estimator": "k2",
        "reference": "initial",
        "entropy_coef": 0.1,
    }
    with scored(**algorithm) as (policy, batches):
        one_update(policy, batches[0])
        metrics, seen = one_update(policy, batches[1])
    mask = joined(seen, "mask").bool()
    old, sampler = joined(seen, "old_logprobs"), joined(seen, "rollout_logprobs")
    weights = torch.where(mask, (old - sampler).exp().clamp(max=0.05), 0.0)
    torch.testing.assert_close(joined(seen, "sampler_weights"), weights, rtol=1e-5, atol=1e-7)
    assert metrics["mismatch/weight_mean"] == pytest.approx(weights[mask].mean().item(), rel=1e-5)
    cut = ((old - sampler).exp()[mask] > 0.05).double().mean().item()
    assert 0 < cut < 1
    assert metrics["mismatch/clipped_fraction"] == pytest.approx(cut)

    new, ref = joined(seen, "logprobs"), joined(seen, "ref_logprobs")
    entropy = joined(seen, "entropy")
    expected = loops(seen, "rspo", {"clip_low": 0.4, "clip_high": 0.4}, "ratio")
    beside = slow_regularisers(
        *(new, ref.tolist(), entropy, mask.tolist(), "k2", 2.0, 0.1, torch.zeros(len(new)), 0.0)
    ).item()
    assert metrics["loss"] == pytest.approx(expected + beside, rel=1e-5)
    assert abs(beside) > 0.01 and abs(expected) > 1e-3
    log_r = (ref - new)[mask]
    assert metrics["kl_ref"] == pytest.approx((log_r.exp() - 1 - log_r).mean().item(), rel=1e-4)
    assert metrics["kl_ref"] > 1e-4
    assert metrics["entropy"] == pytest.approx(entropy[mask].mean().item(), rel=1e-6)


def test_the_reference_of_the_first_update_is_the_old_policy():
    with scored(reference="initial") as (policy, batches):
        for item in batches[0]:
            assert torch.equal(item.ref_logprobs, item.old_logprobs)
        metrics, _ = one_update(policy, batches[0])
        assert metrics["kl_ref"] == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("mode", ["ratio", "negative_only", "range", "token_weight"])
def test_modes_reach_the_loss(mode):
    shift = {"floor": 0.05, "mode": mode}
    with scored(name="gspo", router_shift={"enabled": True, **shift}) as (policy, batches):
        one_update(policy, batches[0])
        metrics, seen = one_update(policy, batches[1])
    assert {inputs.shift_mode for inputs in seen} == {mode}
    settings = {"clip_low": 3e-4, "clip_high": 4e-4}
    assert metrics["loss"] == pytest.approx(loops(seen, "gspo", settings, mode), rel=1e-5)


@pytest.mark.parametrize("mode", ["ratio", "negative_only"])
def test_the_mean_over_the_mini_batch_is_one(mode):
    """Over the tokens gamma acts on, of several packs; telemetry is not counted twice."""
    plain, normal = {"floor": 0.05, "mode": mode}, {"normalise": "batch_mean"}
    found = []
    for shift in (plain, plain | normal):
        with scored(router_shift=shift) as (policy, batches):
            for item in batches[0]:
                assert len(item.traces) == 1
            metrics, seen = one_update(policy, batches[0])
            assert torch.equal(joined(seen, "router_shift"), torch.ones(joined(seen, "mask").shape))
            metrics, seen = one_update(policy, batches[1])
            found.append((metrics, seen))
    (metrics, seen), (other_metrics, other) = found
    assert len(seen) > 1
    acting = joined(seen, "mask").bool()
    if mode == "negative_only":
        acting &= joined(seen, "advantages") < 0
    assert 0 < acting.sum() < len(acting)
    gamma, normalised = joined(seen, "router_shift"), joined(other, "router_shift")
    torch.testing.assert_close(normalised, gamma / gamma[acting].mean(), rtol=1e-5, atol=1e-7)
    assert gamma[acting].mean() < 0.99
    assert other_metrics["router/raw_gamma_mean"] == metrics["router/raw_gamma_mean"]


#: Of four layers: the third smallest is the least that half of them and more do not exceed.
QUANTILES = {0.25: 0, 0.5: 1, 0.51: 2, 0.75: 2, 0.76: 3, 1.0: 3}


@pytest.mark.parametrize(
    ("layers", "quantile"),
    [("mean", 0.9), ("max", 0.9), ("last", 0.9), *(("quantile", q) for q in QUANTILES)],
)
def test_gamma_is_of_the_mean_largest_or_quantile_distance_of_the_layers(layers, quantile):
    from megatron_rl.models.forward import forward_row

    shift = {"floor": 0.0, "layers": layers, "quantile": quantile}
    with scored(router_shift=shift) as (policy, batches):
        one_update(policy, batches[0])
        item = batches[1][0]
        rows = []

        class Listener:
            def add_choice(self, *_):
                pass

            def add_shift(self, layer, mask, distance, overlap):
                rows.append(distance)

        with torch.no_grad(), policy.capture.compare(0, item.traces[0], item.pack.mask, Listener()):
            forward_row(policy.chunks[0], item.pack.tokens, item.pack.placement)
        distances = torch.stack(rows)
        metrics, seen = one_update(policy, batches[1])
    assert len(distances) == 4
    one = {
        "mean": distances.mean(0),
        "max": distances.amax(0),
        "last": distances[3],
        "quantile": distances.sort(0).values[QUANTILES.get(quantile, 0)],
    }[layers]
    here = item.pack.mask
    torch.testing.assert_close(seen[0].router_shift[here], torch.exp(-one)[here])
    smallest = min(inputs.router_shift[inputs.mask].min().item() for inputs in seen)
    assert metrics["router/raw_gamma_min"] == pytest.approx(smallest)
    assert not math.isclose(smallest, 1.0, abs_tol=1e-3)


@pytest.mark.parametrize(
    ("shift", "without", "recompute"),
    [
        ({"floor": 0.0, "stop_gradient": False}, {"stop_gradient": True}, "none"),
        ({"floor": 1.0, "penalty": 0.5}, {"penalty": 0.0}, "none"),
        ({"floor": 1.0, "penalty": 0.5}, {"penalty": 0.0}, "full"),
        ({"floor": 1.0, "layers": "max", "penalty": 0.5}, {"penalty": 0.0}, "none"),
    ],
)
def test_the_gradient_through_the_distance_is_that_of_the_loss(shift, without, recompute):
    """In a direction of all router weights, against differences of the loss. Replay keeps the
    choice of experts: where it changes, the loss jumps.
    """
    slopes = {}
    for attached in (True, False):
        own = shift if attached else {**shift, **without}
        parallel = {"recompute": recompute}
        algorithm = {"name": "rspo", "routing_replay": "r2", "router_shift": own}
        with scored(parallel, **algorithm) as (policy, batches):
            one_update(policy, batches[0])
            one_update(policy, batches[0])
            routers = {
                name: p for name, p in policy.chunks[0].named_parameters() if "router" in name
            }
            rng = torch.Generator().manual_seed(3)
            step = {n: torch.randn(p.shape, generator=rng) for n, p in routers.items()}
            slopes[attached] = slope_of(policy, batches[1], routers, step, attached)
    (found, numeric), (detached, _) = slopes[True], slopes[False]
    assert found == pytest.approx(numeric, rel=0.01)
    assert detached != pytest.approx(numeric, rel=0.03)


def slope_of(policy, items, routers, step, numeric):
    """The loss's slope along ``step``: of the gradient, and of differences."""
    from unittest import mock

    losses, found = {}, None
    sizes = (0.0, 1e-4, -1e-4) if numeric else (0.0,)
    for size in sizes:
        with torch.no_grad():
            for name, weight in routers.items():
                weight += size * step[name]
        with mock.patch.object(policy.optimizer, "step", lambda: (True, 1.0, None)):
            metrics, _ = one_update(policy, items)
        losses[size] = metrics["loss"]
        if size == 0:
            found = sum(float((p.main_grad * step[n]).sum()) for n, p in routers.items())
        with torch.no_grad():
            for name, weight in routers.items():
                weight -= size * step[name]
    if not numeric:
        return found, None
    return found, (losses[sizes[1]] - losses[sizes[2]]) / (2 * sizes[1])
