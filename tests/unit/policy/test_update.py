"""Scoring and updating on one rank, against the equations token by token."""

import contextlib
import dataclasses

import numpy as np
import pytest
import torch

from tests.support.layouts import (
    Case,
    layout_config,
    name_of,
    observed_update,
    policy_of,
    rollout_batch,
)
from tests.support.slow_losses import slow_loss

CASE = Case("one", 1, {})
SAMPLES = rollout_batch(CASE)


@contextlib.contextmanager
def trainer(name="rspo", pack_tokens=48, model=None, **optimizer):
    """(policy, a function that packs lists of samples)."""
    base = layout_config(dataclasses.replace(CASE, model=model or {}))
    updates = {
        "algorithm": base.algorithm.model_copy(update={"name": name}),
        "data": base.data.model_copy(update={"pack_tokens": pack_tokens}),
        "optimizer": base.optimizer.model_copy(update={"clip_grad": 0.0, **optimizer}),
    }
    config = base.model_copy(update=updates)
    with policy_of(config) as policy:
        from megatron_rl.policy.batch import pack_mini_batches

        device = policy.device.torch_device
        yield policy, lambda *lists: pack_mini_batches(lists, config, policy.groups, device)


def run_update(policy, scored):
    """(metrics, loss inputs of each pack, gradients by name) of one update."""
    from megatron_rl.policy.update import update
    from megatron_rl.router.telemetry import RouterTelemetry

    telemetry = RouterTelemetry(4, 8, torch.device("cpu"))
    metrics, seen, _ = observed_update(policy, scored, telemetry, update)
    return metrics, seen, gradients(policy)


def gradients(policy):
    return {name: p.main_grad.clone() for name, p in policy.chunks[0].named_parameters()}


def scored_batch(policy, pack, samples=SAMPLES[:8]):
    from megatron_rl.policy.score import score

    (packs,) = pack(samples)
    return score(policy, packs, with_traces=True)


def alone(policy, sample):
    """Log-probabilities of a sample's completion, the sequence alone in a row: fp32 [N]."""
    from megatron_rl.models.attention import packed_placement
    from megatron_rl.models.forward import forward_row

    tokens = torch.from_numpy(sample.tokens)
    placement = packed_placement([len(tokens)], len(tokens), torch.device("cpu"))
    with torch.no_grad():
        logits = forward_row(policy.chunks[0], tokens, placement).squeeze(0)
    logits = logits / policy.config.rollout.temperature
    logprobs = logits.log_softmax(-1)[:-1].gather(1, tokens[1:, None]).squeeze(1)
    return logprobs[torch.from_numpy(sample.trained)]


def close(found, expected, tolerance=1e-6):
    for name, gradient in expected.items():
        error = float((found[name] - gradient).norm() / gradient.norm().clamp(min=1e-12))
        assert error < tolerance, (name, error)


def test_scored_logprobs_are_those_of_each_sequence_alone():
    from megatron_rl.policy.score import score
    from tests.support.layouts import by_sequence

    with trainer() as (policy, pack):
        scored = scored_batch(policy, pack)
        assert all(sorted(trace) == [1, 2, 3, 4] for item in scored for trace in item.traces)
        without = score(policy, [item.pack for item in scored], with_traces=False)
        assert [item.traces for item in without] == [()] * len(scored)
        found = {}
        for item, other in zip(scored, without):
            assert torch.equal(item.old_logprobs, other.old_logprobs)
            assert not item.old_logprobs.requires_grad
            found |= by_sequence(item.pack, item.old_logprobs)
        for sample in SAMPLES[:8]:
            values = torch.from_numpy(found[tuple(sample.tokens.tolist())])
            torch.testing.assert_close(values, alone(policy, sample), atol=2e-5, rtol=1e-5)


def test_on_the_first_mini_batch_gamma_is_one_and_rspo_is_gmpo_bit_for_bit():
    results = []
    for name in ("rspo", "gmpo"):
        with trainer(name) as (policy, pack):
            results.append(run_update(policy, scored_batch(policy, pack)))
    (metrics, seen, grads), (other_metrics, others, other_grads) = results
    for inputs in seen:
        assert inputs.router_shift.tolist() == [1.0] * len(inputs.mask)
    assert all(inputs.router_shift is None for inputs in others)
    assert metrics == other_metrics
    for name, gradient in grads.items():
        assert torch.equal(gradient, other_grads[name]), name
        assert gradient.norm() > 0, name


@pytest.mark.parametrize("name", ["rspo", "rspo_v1"])
def test_the_loss_of_later_updates_is_the_equation_token_by_token(name):
    with trainer(name) as (policy, pack):
        scored = scored_batch(policy, pack)
        old = {id(sample): alone(policy, sample) for sample in SAMPLES[:8]}
        for _ in range(2):
            run_update(policy, scored)
        new = {id(sample): alone(policy, sample) for sample in SAMPLES[:8]}
        metrics, seen, _ = run_update(policy, scored)
    gammas = {}
    for item, inputs in zip(scored, seen):
        for sequence in range(item.pack.num_sequences):
            here = item.pack.sequence_ids == sequence
            gammas[name_of(item.pack, here)] = inputs.router_shift[here & item.pack.mask]
    columns = [], [], [], [], []
    for number, sample in enumerate(SAMPLES[:8]):
        gamma = gammas[tuple(sample.tokens.tolist())]
        for values in zip(new[id(sample)], old[id(sample)], gamma):
            for column, value in zip(columns, (*values, sample.advantage, number)):
                column.append(float(value))
    logprobs, before, gamma, advantages, ids = columns
    assert min(gamma) < 0.9
    total, count = slow_loss(
        name,
        torch.tensor(logprobs, dtype=torch.float64, requires_grad=True),
        before,
        advantages,
        [True] * len(ids),
        [int(i) for i in ids],
        {"clip_low": 0.4, "clip_high": 0.4},
        gamma,
    )
    assert count == 8
    assert metrics["loss"] == pytest.approx(total.item() / count, rel=2e-5)


def test_gamma_carries_no_gradient():
    with trainer() as (policy, pack):
        scored = scored_batch(policy, pack)
        run_update(policy, scored)
        _, seen, _ = run_update(policy, scored)
    assert all(not inputs.router_shift.requires_grad for inputs in seen)
    assert min(float(inputs.router_shift.min()) for inputs in seen) < 0.99


def test_a_mini_batch_without_a_trained_token_moves_nothing():
    from megatron_rl.data.packing import pack_samples

    with trainer(weight_decay=0.0) as (policy, _):
        from megatron_rl.policy.batch import to_device
        from megatron_rl.policy.score import score

        before = {name: p.detach().clone() for name, p in policy.chunks[0].named_parameters()}
        empty = pack_samples([], 48, 2, vocab_size=128, with_rollout_logprobs=True)
        groups = policy.groups
        packs = [
            to_device(pack, torch.device("cpu"), groups.context, groups.tensor) for pack in empty
        ]
        metrics, _, grads = run_update(policy, score(policy, packs, with_traces=True))
        after = dict(policy.chunks[0].named_parameters())
    assert metrics["grad_norm"] == 0.0
    assert all(gradient.abs().max() == 0.0 for gradient in grads.values())
    assert all(torch.equal(weight, after[name]) for name, weight in before.items())


@pytest.mark.parametrize("name", ["rspo", "dapo", "sft"])
def test_router_losses_are_means_over_tokens_whatever_the_loss_counts(name):
    """With advantages (or trained tokens) of no effect only the routers' losses remain."""
    coefficients = {"aux_loss_coeff": 0.4, "z_loss_coeff": 0.1, "num_layers": 1}
    samples = [dataclasses.replace(sample, advantage=0.0) for sample in SAMPLES[:8]]
    weights = []
    for model in (coefficients, {"num_layers": 1}):
        loss = name if name != "sft" else "rspo"
        with trainer(loss, model=model) as (policy, pack):
            router = policy.chunks[0].decoder.layers[0].mlp.router
            inputs, before = [], router.weight.detach().clone()
            router.register_forward_pre_hook(lambda _, args, seen=inputs: seen.append(args))
            (packs,) = pack(samples)
            if name == "sft":
                supervised(policy, packs)
            else:
                scored = scored_batch(policy, pack, samples)
                inputs.clear()  # of the scoring pass
                run_update(policy, scored)
            weights.append(router.weight.main_grad.clone())
            if model is coefficients:  # without a balancing loss packs may be shorter
                expected = expected_router_gradient(before, inputs, coefficients)
    close({"router": weights[0] - weights[1]}, {"router": expected.float()}, 1e-4)


def test_supervised_accuracy_counts_targets_that_are_the_likeliest_token():
    """Every other target is made the likeliest after what is before it: random ones never are."""
    samples = [dataclasses.replace(s, tokens=s.tokens.copy()) for s in SAMPLES[:4]]
    hits, count = 0, 0
    with trainer() as (policy, pack):

        def likeliest(sample):
            ((row,),) = pack([sample])
            from megatron_rl.models.forward import forward_row

            return forward_row(policy.chunks[0], row.tokens, row.placement)[0].argmax(-1)

        for sample in samples:
            places = np.flatnonzero(sample.written)
            for place in places[::2]:
                sample.tokens[place] = likeliest(sample)[place - 1]
            predicted = likeliest(sample).numpy()
            hits += sum(predicted[place - 1] == sample.tokens[place] for place in places)
            count += len(places)
        (packs,) = pack(samples)
        metrics = supervised(policy, packs)
    assert 0.4 < hits / count < 0.9
    assert metrics["accuracy"] == pytest.approx(hits / count, abs=1e-6)


def test_the_supervised_loss_is_the_mean_over_the_tokens_of_all_turns():
    samples = rollout_batch(dataclasses.replace(CASE, turns=True))[:8]
    masks = ["".join(".w"[int(word)] for word in sample.written) for sample in samples]
    assert any("w." in mask.strip(".") for mask in masks) and any("w" not in mask for mask in masks)
    with trainer() as (policy, pack):
        values = torch.cat([alone(policy, sample) for sample in samples])
        (packs,) = pack(samples)
        metrics = supervised(policy, packs)
    assert len(values) == sum(mask[1:].count("w") for mask in masks)
    assert metrics["loss"] == pytest.approx(-float(values.mean()), rel=2e-5)


def supervised(policy, packs):
    from megatron_rl.observe.metrics import MetricSums
    from megatron_rl.policy.update import supervised_update

    sums = MetricSums(4)
    supervised_update(policy, packs, sums)
    return sums.reduce()


def expected_router_gradient(weight, inputs, coefficients):
    """Of the mean over all real tokens of the packs' losses."""
    wide = weight.double().requires_grad_()
    total, tokens = 0.0, 0
    for hidden, padding in inputs:
        logits = hidden.detach().flatten(0, 1)[~padding.flatten()].double() @ wide.T
        scores = logits.softmax(-1)
        chosen = scores.topk(2, dim=1).indices
        count = len(logits)
        frequencies = torch.zeros(8, dtype=torch.float64)
        frequencies.index_add_(0, chosen.flatten(), torch.ones(2 * count, dtype=torch.float64))
        balance = 8 / (2 * count**2) * (scores.sum(0) * frequencies).sum()
        z = logits.logsumexp(-1).square().mean()
        total = total + count * (
            coefficients["aux_loss_coeff"] * balance + coefficients["z_loss_coeff"] * z
        )
        tokens += count
    (total / tokens).backward()
    return wide.grad
