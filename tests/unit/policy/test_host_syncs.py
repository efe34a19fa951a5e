"""A scoring pass and an update wait for the device a fixed number of times.

Not once a pack or a layer: else the device would run dry between them.
"""

import pytest
import torch

from tests.support.host_syncs import HostSyncs
from tests.support.layout_cases import Case
from tests.support.layouts import layout_config, policy_of, rollout_batch
from tests.support.tiny import cpu_device

AUX = {"aux_loss_coeff": 0.05, "z_loss_coeff": 0.01}
EVERYTHING = {
    "mismatch": "tis",
    "kl_coef": 0.5,
    "reference": "initial",
    "entropy_coef": 0.05,
    "router_shift": {"floor": 0.05, "normalise": "batch_mean"},
}


def waits(algorithm, model, pack_tokens):
    """(packs, places that wait while scoring, while updating, while reducing the metrics)."""
    case = Case("one", 1, {}, model, algorithm=algorithm)
    config = layout_config(case)
    data = config.data.model_copy(update={"pack_tokens": pack_tokens})
    with policy_of(config.model_copy(update={"data": data})) as policy:
        from megatron_rl.observe.metrics import MetricSums
        from megatron_rl.policy.batch import pack_mini_batches
        from megatron_rl.policy.score import score, score_reference
        from megatron_rl.policy.update import update
        from megatron_rl.router.telemetry import RouterTelemetry

        device = torch.device("cpu")
        (packs,) = pack_mini_batches(
            [rollout_batch(case)[:8]], policy.config, policy.groups, device
        )
        if policy.reference is not None:
            policy.reference.take()
        with HostSyncs() as scoring:
            scored = score(policy, packs, with_traces=True)
            if policy.reference is not None:
                scored = score_reference(policy, scored)
        layers = policy.config.model.num_layers
        sums = MetricSums(layers)
        telemetry = RouterTelemetry(layers, policy.config.model.num_experts, device)
        with HostSyncs() as updating:
            update(policy, scored, sums, telemetry)
        with HostSyncs() as reducing:
            sums.reduce(policy.groups.world)
        return len(packs), scoring.places, updating.places, reducing.places


@pytest.mark.parametrize(
    "algorithm, model",
    [({}, {}), (EVERYTHING, AUX)],
    ids=["rspo", "everything"],
)
def test_waits_grow_neither_with_packs_nor_with_layers(algorithm, model, monkeypatch):
    cpu_device()
    from megatron_rl.models import experts

    # CUDA's way: only a CPU takes experts one by one, and reads their numbers of rows for that.
    monkeypatch.setattr(experts, "ROWS_OF_ITS_OWN", 2**40)
    few = waits(algorithm, {**model, "num_layers": 2}, 160)
    many = waits(algorithm, {**model, "num_layers": 4}, 24)
    assert (few[0], many[0]) == (1, 4)
    assert few[1:] == many[1:]
    _, scoring, updating, reducing = many
    assert not scoring and not updating
    # Of the whole step: one read, and the floats among the sums and extremes to the device.
    assert reducing == {"observe/metrics.py: reduce": 1, "observe/metrics.py: _pack": 4}


def wait(kind, values):
    if kind == "item":
        return values.sum().item()
    if kind == "bool":
        return bool((values > 0).all())
    if kind == "list":
        return values.tolist()
    if kind == "index":
        return values[values > 0]
    return torch.where(values > 0, values, 0.0).sum()


def test_the_counter_counts(monkeypatch):
    """Else the test above would say little."""
    code = compile(
        "def asked(wait, kind, values):\n    return wait(kind, values)\n",
        str(HostSyncs._found.__globals__["ROOT"] / "megatron_rl" / "room" / "file.py"),
        "exec",
    )
    scope = {}
    exec(code, scope)  # a function that stands in the package
    values = torch.arange(3.0)
    for kind, count in (("item", 1), ("bool", 1), ("list", 1), ("index", 1), ("none", 0)):
        with HostSyncs() as syncs:
            scope["asked"](wait, kind, values)
        assert sum(syncs.places.values()) >= count and bool(syncs.places) == bool(count), kind
        assert set(syncs.places) <= {"room/file.py: asked"}
