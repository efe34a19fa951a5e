"""The head computes what is trained and nothing else; the values are those of all rows."""

import dataclasses

import numpy as np
import pytest
import torch

from megatron_rl.records import KeptTokens, Sample
from tests.support.layout_cases import Case
from tests.support.layouts import layout_config, policy_of

CPU = torch.device("cpu")
CASE = Case("one", 1, {})


def samples_of(shapes):
    """Prompt and answer of each (prompt length, answer length); prompts of one length are equal."""
    draw = np.random.default_rng(4)
    prompts = {n: draw.integers(0, 128, n) for n, _ in shapes}
    logprobs = lambda n: np.full(n, -0.5, dtype=np.float32)  # noqa: E731
    return [Sample.of(prompts[n], draw.integers(0, 128, m), 1.0, logprobs(m)) for n, m in shapes]


def packed(policy, config, shapes):
    from megatron_rl.policy.batch import pack_mini_batches

    ((pack,),) = pack_mini_batches([samples_of(shapes)], config, policy.groups, CPU)
    return pack


def config_of(share):
    config = layout_config(CASE)
    data = {"share_prompts": share, "pack_tokens": 64, "pack_multiple": 1}
    return config.model_copy(update={"data": config.data.model_copy(update=data)})


def test_by_hand_without_shared_prompts():
    config = config_of("off")
    with policy_of(config) as policy:
        # A prompt of 3 tokens and one of the answer are read: places 2 and 3 predict; then a prompt
        # at 4 and 5.
        assert packed(policy, config, [(3, 2), (2, 1)]).predicting.tolist() == [2, 3, 5]


def test_by_hand_with_shared_prompts():
    config = config_of("auto")
    with policy_of(config) as policy:
        pack = packed(policy, config, [(6, 2), (6, 2)])
        assert pack.shared is not None
        # Prompt 0..5, answers 6 and 7. Row 5 predicts 6, and 7 as an extra prediction, behind the 8
        # of the rows.
        assert pack.predicting.tolist() == [5, 6, 7, 8]


def test_where_nearly_all_is_trained_nothing_is_left_out():
    config = config_of("off")
    with policy_of(config) as policy:
        assert packed(policy, config, [(1, 20)]).predicting is None


@pytest.mark.parametrize("share", ["off", "auto"])
@pytest.mark.parametrize("entropy", ["none", "detached", "differentiable"])
def test_values_and_gradients_are_those_of_all_rows(share, entropy):
    config = config_of(share)
    with policy_of(config) as policy:
        from megatron_rl.policy.pass_over_pack import forward_pack, pack_values

        pack = packed(policy, config, [(6, 3), (6, 5), (6, 1), (4, 2)])
        assert pack.predicting is not None and (pack.shared is not None) == (share == "auto")
        with torch.no_grad():
            hidden = forward_pack(policy.chunks[0], pack)
        weight = policy.chunks[0].output_layer.weight
        found = []
        for one in (pack, dataclasses.replace(pack, predicting=None)):
            states = hidden.clone().requires_grad_()
            values = pack_values(policy, states, one, 0.7, entropy=entropy)
            total = (values.logprobs * pack.mask * torch.arange(len(pack.mask))).sum()
            if entropy == "differentiable":
                total = total + (values.entropy * pack.mask).square().sum()
            gradients = torch.autograd.grad(total, (states, weight))
            spread = [] if values.entropy is None else [values.entropy[pack.mask]]
            found.append([values.logprobs[pack.mask], *spread, *gradients])
            assert values.hits.dtype == torch.bool
            found[-1].append(values.hits[pack.mask].float())
        for ours, whole in zip(*found, strict=True):
            torch.testing.assert_close(ours, whole, atol=2e-6, rtol=2e-6)
        assert all(whole.abs().max() > 0 for whole in found[1][:-1])


def kept_of(sets):
    ids = np.array([number for each in sets for number in each])
    return KeptTokens.of_sizes(ids, np.array([len(each) for each in sets], dtype=int))


@pytest.mark.parametrize("share", ["off", "auto"])
def test_every_token_has_its_own_set_also_where_rows_are_shared(share):
    """Answers that begin alike, of the same prompt, in sets of their own: one of them twice."""
    config = config_of(share)
    with policy_of(config) as policy:
        from megatron_rl.policy.batch import pack_mini_batches
        from megatron_rl.policy.pass_over_pack import forward_pack, pack_values

        logprobs, prompt = np.full(2, -0.5, dtype=np.float32), np.arange(9)
        answers = [
            ([7, 8], [[7, 1], [8, 2, 3]]), ([7, 8], [[1, 7], [8]]), ([7, 9], [[7], [9, 4]]),
            ([6, 9], [[7, 6], [9, 5]]), ([7, 5], [[], [5, 4]]),
        ]  # fmt: skip
        samples = [
            Sample.of(prompt, np.array(tokens), 1.0, logprobs, kept=kept_of(sets))
            for tokens, sets in answers
        ]
        ((pack,),) = pack_mini_batches([samples], config, policy.groups, CPU)
        assert (pack.shared is not None) == (share == "auto")
        hidden = forward_pack(policy.chunks[0], pack)
        found = pack_values(policy, hidden, pack, 0.7, entropy="detached")
        weight, rows = policy.chunks[0].output_layer.weight, hidden.squeeze(1)
        rows = rows if pack.shared is None else rows[pack.shared.places]
        logits = (rows @ weight.t() / 0.7)[pack.mask].double()
        for place, (token, ids) in enumerate(
            (token, ids) for tokens, sets in answers for token, ids in zip(tokens, sets)
        ):
            over = logits[place, ids or slice(None)].log_softmax(0)
            expected = over[ids.index(token) if ids else token]
            assert found.logprobs[pack.mask][place].item() == pytest.approx(
                expected.item(), abs=2e-5
            )
            entropy = -(over.exp() * over).sum().item()
            assert found.entropy[pack.mask][place].item() == pytest.approx(entropy, abs=2e-5)
        assert not found.logprobs[~pack.mask].any()
