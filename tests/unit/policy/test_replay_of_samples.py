"""R3 from the sampler to the update: the built-in engine's experts are replayed."""

import dataclasses

import numpy as np
import pytest
import torch

from megatron_rl.rewards.base import Reward
from megatron_rl.rollout.collect import ScoredGroup, to_samples
from megatron_rl.rollout.engine import SamplingSettings
from tests.support.layouts import (
    Case,
    by_sequence,
    layout_config,
    name_of,
    observed_update,
    policy_of,
)
from tests.support.tiny import random_prompts, spell


def sampled(policy):
    """Training samples of the built-in engine, with their experts."""
    from megatron_rl.rollout.builtin.generate import BuiltinEngine

    engine = BuiltinEngine(
        policy.chunks,
        policy.groups,
        policy.transformer,
        stop_ids=(31,),
        max_batch=6,
        decode=spell,
        max_sequence_length=policy.config.model.max_sequence_length,
        capture=policy.capture,
    )
    settings = SamplingSettings(samples=4, max_new_tokens=12, seed=3, routes=True)
    groups = engine.generate(random_prompts([5, 1, 9]), settings)
    rewards = (Reward(1.0, {}, ""),) * 4
    advantages = np.linspace(-1.0, 2.0, 12).reshape(3, 4)
    return to_samples([ScoredGroup(group, rewards) for group in groups], advantages)


def scored(policy, samples):
    from megatron_rl.policy.batch import pack_mini_batches
    from megatron_rl.policy.score import score

    device = policy.device.torch_device
    (packs,) = pack_mini_batches([samples], policy.config, policy.groups, device)
    return score(policy, packs, with_traces=True)


def run(algorithm, change=None, updates=0, share_prompts="off"):
    """(samples, scored packs, loss inputs of the last update)."""
    from megatron_rl.policy.update import update
    from megatron_rl.router.telemetry import RouterTelemetry

    with policy_of(
        layout_config(Case("one", 1, {}, algorithm=algorithm, share_prompts=share_prompts))
    ) as policy:
        samples = sampled(policy)
        if change is not None:
            samples = [change(sample) for sample in samples]
        items, seen = scored(policy, samples), []
        telemetry = RouterTelemetry(4, 8, torch.device("cpu"))
        for _ in range(updates):
            _, seen, _ = observed_update(policy, items, telemetry, update)
        return samples, items, seen, telemetry


def test_in_fp32_the_sampler_and_the_scoring_pass_choose_the_same_experts():
    _, free, _, _ = run({})
    samples, replayed, _, _ = run({"routing_replay": "r3"})
    assert len(free) == len(replayed) > 1
    real = 0
    for one, other in zip(free, replayed):
        assert one.pack.routes is None
        inside = one.pack.mask
        real += int(inside.sum())
        torch.testing.assert_close(
            one.old_logprobs[inside], other.old_logprobs[inside], atol=1e-5, rtol=1e-5
        )
        for layer, trace in one.traces[0].items():
            assert torch.equal(trace.expert_ids[inside], other.traces[0][layer].expert_ids[inside])
    assert real == sum(int(s.written.sum()) for s in samples)


def test_the_sampler_and_the_replayed_scoring_pass_agree_on_the_logprobs():
    _, items, _, _ = run({"routing_replay": "r3"})
    for item in items:
        here = item.pack.mask
        torch.testing.assert_close(
            item.old_logprobs[here], item.pack.rollout_logprobs[here], atol=1e-5, rtol=1e-5
        )


def other_experts(sample):
    """Every expert e of the sampler becomes e + 3 mod 8."""
    routed = sample.routed_experts
    ids = ((routed.ids.astype(np.int64) + 3) % 8).astype(np.uint8)
    return dataclasses.replace(sample, routed_experts=dataclasses.replace(routed, ids=ids))


def test_experts_that_are_changed_on_the_way_are_those_of_the_trace_and_of_the_update():
    samples, items, seen, telemetry = run({"routing_replay": "r3"}, other_experts, updates=2)
    routed = {tuple(s.tokens.tolist()): s.routed_experts for s in samples}
    _, free, _, _ = run({})
    for item, one in zip(items, free):
        for number in range(item.pack.num_sequences):
            rows = item.pack.sequence_ids == number
            experts = routed[name_of(item.pack, rows)]
            for column, layer in enumerate(experts.layers):
                trace = item.traces[0][layer].expert_ids[rows]
                assert trace.tolist() == np.sort(experts.ids[:, column]).tolist()
        here = one.pack.mask
        assert (item.old_logprobs - one.old_logprobs)[here].abs().max() > 0.1
    # The update takes them again, while its routers have moved away from the trace.
    overlap, compared = (
        telemetry.sums[:, telemetry.COLUMNS.index(name)] for name in ("overlap", "compared")
    )
    assert torch.equal(overlap, compared)
    assert min(float(inputs.router_shift[inputs.mask].min()) for inputs in seen) < 0.99


@pytest.mark.parametrize("replay", ["r2", "r3"])
def test_on_the_first_mini_batch_replay_changes_nothing(replay):
    """The routers would choose the same experts; gamma is exactly 1."""
    _, _, free, _ = run({}, updates=1)
    _, _, replayed, _ = run({"routing_replay": replay}, updates=1)
    for one, other in zip(free, replayed):
        here = one.mask
        assert other.router_shift[here].tolist() == [1.0] * int(here.sum())
        torch.testing.assert_close(one.logprobs[here], other.logprobs[here], atol=1e-5, rtol=1e-5)


def test_samples_without_experts_are_refused():
    forget = lambda sample: dataclasses.replace(sample, routed_experts=None)  # noqa: E731
    with pytest.raises(ValueError, match="sample 0 has no experts of the sampler"):
        run({"routing_replay": "r3"}, forget)


def test_with_shared_prompts_the_experts_that_are_changed_on_the_way_are_the_same():
    """Of each token the log-probability and gamma, which depend on the experts of all before it."""
    found = {}
    for share in ("off", "on"):
        _, items, seen, _ = run({"routing_replay": "r3"}, other_experts, 2, share_prompts=share)
        values = {}
        for item, inputs in zip(items, seen, strict=True):
            for name, of in {"old": item.old_logprobs, "gamma": inputs.router_shift}.items():
                values |= {(name, *key): v for key, v in by_sequence(item.pack, of).items()}
        found[share] = values, sum(len(item.pack.row) for item in items)
    (apart, rows), (together, fewer) = found["off"], found["on"]
    assert set(apart) == set(together) and fewer < rows
    for name, value in apart.items():
        np.testing.assert_allclose(together[name], value, rtol=1e-5, atol=1e-5)
