"""Three updates on answers of the built-in engine: scored by a pass, and by the sampler."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from megatron_rl.records import Prompt, Sample
from tests.support.layout_cases import Case
from tests.support.layouts import MINI_BATCHES, SEQUENCES, layout_config, observed_update, policy_of

#: Answers to a prompt; a mini-batch has SEQUENCES / SAMPLES prompts.
SAMPLES = 4


def prompts_of(case: Case) -> list[Prompt]:
    """The prompts of all mini-batches and ranks, of 2 to 9 tokens."""
    rng = np.random.default_rng(3 + case.seed)
    vocab_size = layout_config(case).model.vocab_size
    return [
        Prompt(index, rng.integers(0, vocab_size, int(rng.integers(2, 10))), "", {})
        for index in range(MINI_BATCHES * SEQUENCES // SAMPLES)
    ]


def sampled(policy: Any, case: Case) -> list[list[Sample]]:
    """This rank's samples, mini-batch by mini-batch, with the sampler's traces."""
    from megatron_rl.rollout.builtin.generate import BuiltinEngine
    from megatron_rl.rollout.engine import SamplingSettings

    groups, per_batch = policy.groups, SEQUENCES // SAMPLES
    share = per_batch // groups.data.size()
    first, prompts = groups.data.rank() * share, prompts_of(case)
    starts = [m * per_batch + first for m in range(MINI_BATCHES)]
    mine = [prompt for start in starts for prompt in prompts[start : start + share]]
    engine = BuiltinEngine(
        policy.chunks, groups, policy.transformer, [0], 16, lambda ids: "",
        policy.config.model.max_sequence_length, policy.capture,
    )  # fmt: skip
    assert engine.plan.is_plain, engine.plan
    settings = SamplingSettings(
        SAMPLES, 14, policy.config.rollout.temperature, seed=5, routes=True, router_logprobs=True
    )
    if case.kept:
        settings = dataclasses.replace(settings, top_p=0.9, top_k=40, kept=True)
    samples = [
        Sample.of(
            group.prompt.tokens,
            answer.tokens,
            (group.prompt.index * 7 + number * 3) % 5 - 1.7,
            answer.logprobs,
            answer.routed_experts,
            kept=answer.kept,
        )
        for group in engine.generate(mine, settings)
        for number, answer in enumerate(group.completions)
    ]
    size = len(samples) // MINI_BATCHES
    return [samples[i : i + size] for i in range(0, len(samples), size)]


def without_traces(samples: list[Sample]) -> list[Sample]:
    """The same samples without experts."""
    return [dataclasses.replace(sample, routed_experts=None) for sample in samples]


def both_ways(case: Case) -> dict[str, Any]:
    """On a rank: the updates by a pass and by the sampler, and how the scores agree."""
    config = layout_config(case)
    results: dict[str, Any] = {}
    for way in ("pass", "sampler"):
        with policy_of(config) as policy:
            results[way] = _train(policy, case, way, results)
    return results


def _train(policy: Any, case: Case, way: str, results: dict[str, Any]) -> list[dict[str, Any]]:
    from megatron_rl.policy.batch import pack_mini_batches
    from megatron_rl.policy.sampler_scores import compare_scores, take_scores
    from megatron_rl.policy.score import score, unscored
    from megatron_rl.policy.update import update
    from megatron_rl.router.telemetry import RouterTelemetry
    from tests.support.layouts import gathered, unshard_gradients

    config, device = policy.config, policy.device.torch_device
    samples = sampled(policy, case)
    if way == "pass":
        samples = [without_traces(batch) for batch in samples]
    packed = pack_mini_batches(samples, config, policy.groups, device, with_traces=way == "sampler")
    flat = [pack for packs in packed[1:] for pack in packs]
    results["shared"] = [pack.shared is not None for pack in flat]
    if way == "pass":
        scored = score(policy, flat, with_traces=True)
    else:
        scored = take_scores(policy, flat, with_traces=True)
        results["agreement"] = compare_scores(policy, score(policy, flat, with_traces=True), scored)
    scored = unscored(policy, packed[0], with_traces=True) + scored
    size, found = len(packed[0]), []
    telemetry = RouterTelemetry(config.model.num_layers, config.model.num_experts, device)
    for start in range(0, len(scored), size):
        items = scored[start : start + size]
        scalars, seen, _ = observed_update(policy, items, telemetry, update)
        unshard_gradients(policy)
        gammas = [
            np.zeros(0) if inputs.router_shift is None
            else inputs.router_shift.detach()[item.pack.mask].cpu().numpy()
            for item, inputs in zip(items, seen)
        ]  # fmt: skip
        found.append({**scalars, "gamma": gammas, "gradients": gathered(policy, "main_grad")})
    return found
