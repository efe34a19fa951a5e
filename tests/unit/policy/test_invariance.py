"""What must not change an update: how its sequences are packed, the order of the packs, packs
without a trained token, and padding.
"""

import dataclasses

import numpy as np
import pytest
import torch

from tests.support.layout_cases import TOLERANCE, Case
from tests.support.layouts import layout_config, observed_update, policy_of, rollout_batch

CASE = Case("one", 1, {})
SAMPLES = rollout_batch(CASE)[:8]
CPU = torch.device("cpu")
AUX = {"aux_loss_coeff": 0.05, "z_loss_coeff": 0.01}


@dataclasses.dataclass(frozen=True)
class Second:
    """The second update on the same sequences, when gamma is below 1 and ratios are clipped."""

    num_packs: int
    metrics: dict
    gradients: dict
    load: torch.Tensor  #: [L, E], trained tokens of each expert
    weights: dict


def second_update(rearrange=lambda packs: packs, *, pack_tokens=40, samples=SAMPLES, **fields):
    """Two updates on the packs of the samples, which ``rearrange`` may reorder and add to."""
    case = dataclasses.replace(CASE, **fields)
    base = layout_config(case)
    data = base.data.model_copy(update={"pack_tokens": pack_tokens})
    optimizer = base.optimizer.model_copy(update={"clip_grad": 0.0})
    config = base.model_copy(update={"data": data, "optimizer": optimizer})
    with policy_of(config) as policy:
        from megatron_rl.policy.batch import pack_mini_batches
        from megatron_rl.policy.score import score
        from megatron_rl.policy.update import update
        from megatron_rl.router.telemetry import RouterTelemetry

        (packs,) = pack_mini_batches([samples], config, policy.groups, CPU)
        scored = score(policy, rearrange(packs), with_traces=True)
        for _ in range(2):
            telemetry = RouterTelemetry(4, 8, CPU)
            metrics, seen, _ = observed_update(policy, scored, telemetry, update)
        assert min(float(inputs.router_shift.min()) for inputs in seen) < 0.95
        named = dict(policy.chunks[0].named_parameters())
        return Second(
            len(scored),
            metrics | telemetry.reduce(policy.groups.world),
            {name: p.main_grad.clone() for name, p in named.items()},
            telemetry.load,
            {name: p.detach().clone() for name, p in named.items()} | _biases(policy),
        )


def _biases(policy):
    routers = [layer.mlp.router for layer in policy.chunks[0].decoder.layers]
    biases = {f"bias {i}": router.expert_bias for i, router in enumerate(routers)}
    return {name: bias.clone() for name, bias in biases.items() if bias is not None}


def same(found, expected):
    """Up to fp32 rounding, which differs between processors."""
    assert found.metrics == pytest.approx(expected.metrics, rel=TOLERANCE)
    assert torch.equal(found.load, expected.load)
    for kind in ("gradients", "weights"):
        for name, tensor in getattr(expected, kind).items():
            error = float((getattr(found, kind)[name] - tensor).norm() / tensor.norm())
            assert error < TOLERANCE, (kind, name, error)


def bitwise(found, expected):
    assert found.metrics == expected.metrics and torch.equal(found.load, expected.load)
    for kind in ("gradients", "weights"):
        for name, tensor in getattr(expected, kind).items():
            assert torch.equal(getattr(found, kind)[name], tensor), (kind, name)


@pytest.fixture(scope="module")
def plain():
    return second_update()


def test_the_order_of_the_packs_does_not_matter(plain):
    same(second_update(lambda packs: packs[::-1]), plain)
    same(second_update(lambda packs: [packs[1], packs[2], packs[0]]), plain)


@pytest.mark.parametrize(
    "pack_tokens, samples, num_packs",
    [
        (160, SAMPLES, 1),
        (24, SAMPLES, 4),
        (40, SAMPLES[::-1], 3),
        (64, SAMPLES[3:] + SAMPLES[:3], 2),
    ],
)
def test_the_split_into_packs_does_not_matter(plain, pack_tokens, samples, num_packs):
    other = second_update(pack_tokens=pack_tokens, samples=samples)
    assert (plain.num_packs, other.num_packs) == (3, num_packs)
    same(other, plain)


def masked(packs):
    """A pack of real sequences none of whose tokens is trained, with advantages and log-probs."""
    pack = packs[0]
    return dataclasses.replace(pack, mask=torch.zeros_like(pack.mask))


def empty(packs):
    """A pack of padding alone."""
    from megatron_rl.data.packing import pack_samples
    from megatron_rl.policy.batch import to_device

    (pack,) = pack_samples([], len(packs[0].tokens), 1, vocab_size=128, with_rollout_logprobs=True)
    alone = packs[0].shards.group
    return to_device(pack, CPU, alone, alone)


@pytest.mark.parametrize("extra", [masked, empty])
@pytest.mark.parametrize("place", [0, 1, 3])
def test_a_pack_without_a_trained_token_changes_no_bit(plain, extra, place):
    found = second_update(lambda packs: [*packs[:place], extra(packs), *packs[place:]])
    assert found.num_packs == plain.num_packs + 1
    bitwise(found, plain)


def test_an_empty_pack_changes_nothing_of_the_router_losses():
    expected = second_update(model=AUX)
    found = second_update(lambda packs: [packs[0], empty(packs), *packs[1:]], model=AUX)
    bitwise(found, expected)


def test_what_stands_in_the_padding_does_not_matter():
    """To gradients with router losses, to expert biases and loads, to routing statistics."""

    def other_padding(packs):
        changed = []
        for pack in packs:
            padding = pack.sequence_ids == pack.num_sequences
            changed.append(dataclasses.replace(pack, tokens=torch.where(padding, 77, pack.tokens)))
        assert any((pack.sequence_ids == pack.num_sequences).any() for pack in packs)
        return changed

    bias = {"router_score": "sigmoid", "router_expert_bias": True, "expert_bias_update_rate": 0.01}
    for model in (AUX, bias):
        same(second_update(other_padding, model=model), second_update(model=model))


def share_of_busiest_expert(tokens):
    """[L]: of a row of padding, the part of the tokens that goes to each layer's busiest expert."""
    from megatron_rl.models.attention import packed_placement
    from megatron_rl.models.forward import forward_row

    with policy_of(layout_config(CASE)) as policy, torch.no_grad():
        with policy.capture.record(0) as trace:
            forward_row(policy.chunks[0], tokens, packed_placement([], len(tokens), CPU))
    counts = [torch.bincount(layer.expert_ids.flatten().long()) for layer in trace.values()]
    return [float(count.max()) / len(tokens) for count in counts]


def test_padding_is_spread_over_the_experts():
    from megatron_rl.data.packing import pack_samples

    (pack,) = pack_samples([], 96, 1, vocab_size=128)
    shares = share_of_busiest_expert(torch.from_numpy(pack.tokens))
    assert max(shares) < 0.6  # evenly it would be K / E = 0.25
    alike = share_of_busiest_expert(torch.from_numpy(np.zeros(96, dtype=np.int64)))
    assert min(alike) == 1.0  # what one id for all of it would do
