"""Muon in a policy against a slow version that writes each matrix out."""

import pytest
import torch

from megatron_rl.optimizers.newton_schulz import QUINTIC
from tests.support.layouts import Case, layout_config, policy_of

LR, DECAY, BETA = 0.01, 0.5, 0.9


def build(model=None, **optimizer):
    settings = {"momentum": BETA, **optimizer}
    case = Case("one", 1, {}, {"num_layers": 2, "moe_layer_freq": [0, 1], **(model or {})})
    config = layout_config(case)
    updated = {
        "name": "muon", "settings": settings, "lr": LR, "weight_decay": DECAY, "clip_grad": 0.0
    }  # fmt: skip
    return policy_of(
        config.model_copy(update={"optimizer": config.optimizer.model_copy(update=updated)})
    )


def gradient_of(parameter, number):
    generator = torch.Generator().manual_seed(number)
    return torch.randn(parameter.shape, generator=generator)


def steps(policy, count=2):
    """Weights before and after some steps, by name, with gradients of `gradient_of`."""
    named = dict(policy.chunks[0].named_parameters())
    before = {name: p.detach().clone() for name, p in named.items()}
    for number in range(count):
        for index, parameter in enumerate(named.values()):
            parameter.main_grad.copy_(gradient_of(parameter, 1000 * number + index))
        policy.scheduler.step(increment=1)
        policy.optimizer.step()
    return before, {name: p.detach().float() for name, p in named.items()}


def slow_matrix(weight, gradients, scale, nesterov=True, steps=5):
    """Weight [m, n] after Muon's updates, one matrix at a time in fp64."""
    weight, momentum = weight.double(), torch.zeros_like(weight, dtype=torch.float64)
    a, b, c = QUINTIC
    for gradient in gradients:
        gradient = gradient.double()
        momentum = BETA * momentum + (1 - BETA) * gradient
        direction = BETA * momentum + (1 - BETA) * gradient if nesterov else momentum
        left, values, right = torch.linalg.svd(direction, full_matrices=False)
        values = values / values.square().sum().sqrt()
        for _ in range(steps):
            values = a * values + b * values**3 + c * values**5
        weight = (1 - LR * DECAY) * weight - LR * scale(*weight.shape) * (left * values @ right)
    return weight


def rms(rows, columns):
    return 0.2 * max(rows, columns) ** 0.5


def spectral(rows, columns):
    return 3.0 * max(1.0, rows / columns) ** 0.5


def pieces(name, config):
    """Where the matrices are in a weight: lists of rows, of one expert."""
    if name.endswith("linear_qkv.weight"):
        heads, groups, width = 4, 2, 16
        per_group = heads // groups + 2
        rows = torch.arange(groups * per_group * width).view(groups, per_group, width)
        return [rows[:, :2].flatten(), rows[:, 2].flatten(), rows[:, 3].flatten()]
    if "linear_fc1" in name:
        inner = config.model.moe_ffn_hidden_size if ".experts." in name else 96
        inner = config.model.shared_expert_ffn_hidden_size if "shared" in name else inner
        return [torch.arange(inner), torch.arange(inner, 2 * inner)]
    return [slice(None)]


MATRICES = {
    "decoder.layers.0.self_attention.linear_qkv.weight",
    "decoder.layers.0.self_attention.linear_proj.weight",
    "decoder.layers.0.mlp.linear_fc1.weight",
    "decoder.layers.0.mlp.linear_fc2.weight",
    "decoder.layers.1.self_attention.linear_qkv.weight",
    "decoder.layers.1.self_attention.linear_proj.weight",
    "decoder.layers.1.mlp.experts.linear_fc1.weight",
    "decoder.layers.1.mlp.experts.linear_fc2.weight",
    "decoder.layers.1.mlp.shared_experts.linear_fc1.weight",
    "decoder.layers.1.mlp.shared_experts.linear_fc2.weight",
}
SHARED = {"shared_expert_ffn_hidden_size": 40, "shared_expert_gate": True}


@pytest.mark.parametrize(
    ("settings", "scale", "nesterov"),
    [
        ({}, rms, True),
        ({"scale": "spectral", "scale_factor": 3.0, "nesterov": False}, spectral, False),
    ],
)
def test_each_matrix_takes_muons_steps_by_itself(settings, scale, nesterov):
    with build(SHARED, **settings) as policy:
        before, after = steps(policy)
        names = list(before)
        for name in MATRICES:
            index = names.index(name)
            gradients = [gradient_of(before[name], 1000 * n + index) for n in (0, 1)]
            stacked = before[name].dim() == 3
            for expert in range(8 if stacked else 1):
                pick = (lambda t, e=expert: t[e]) if stacked else (lambda t: t)
                for rows in pieces(name, policy.config):
                    parts = [pick(gradient)[rows] for gradient in gradients]
                    expected = slow_matrix(pick(before[name])[rows], parts, scale, nesterov)
                    found = pick(after[name])[rows].double()
                    torch.testing.assert_close(found, expected, rtol=0, atol=2e-6, msg=name)


def adams(weight, gradients, decay):
    """The weight after torch's AdamW, with the betas and epsilon of `layout_config`."""
    weight = weight.clone().float()
    adam = torch.optim.AdamW(
        [weight], lr=LR, betas=(0.9, 0.95), eps=1e-4, weight_decay=decay, fused=True
    )
    for gradient in gradients:
        weight.grad = gradient
        adam.step()
    return weight


@pytest.mark.parametrize("routers", [False, True])
def test_the_rest_takes_adams_steps_to_the_bit(routers):
    with build(SHARED, routers=routers) as policy:
        before, after = steps(policy)
        names, seen = list(before), []
        for index, name in enumerate(names):
            gradients = [gradient_of(before[name], 1000 * n + index) for n in (0, 1)]
            decay = 0.0 if before[name].dim() == 1 else DECAY
            is_adams = torch.equal(after[name], adams(before[name], gradients, decay))
            seen += [name] * is_adams
        scores = {
            "decoder.layers.1.mlp.router.weight",
            "decoder.layers.1.mlp.shared_experts.gate_weight",
        }
        assert set(names) - set(seen) == MATRICES | (scores if routers else set())
        assert {"embedding.word_embeddings.weight", "output_layer.weight"} <= set(seen)


LATENT = {
    "kv_lora_rank": 20, "q_lora_rank": 24, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8,
    "v_head_dim": 12, "head_dim": None, "num_query_groups": None,
}  # fmt: skip


def test_of_latent_attention_each_projection_is_one_matrix():
    with build(LATENT) as policy:
        before, after = steps(policy, count=1)
        names = [name for name in before if "self_attention.linear_" in name]
        assert len(names) == 2 * 5
        for name in names:
            gradient = gradient_of(before[name], list(before).index(name))
            expected = slow_matrix(before[name], [gradient], rms)
            torch.testing.assert_close(after[name].double(), expected, rtol=0, atol=2e-6)


def test_the_learning_rate_is_the_schedules():
    with build() as policy:
        rates = {group["lr"] for group in policy.optimizer.param_groups}
        policy.scheduler.max_lr = 0.25
        for group in policy.optimizer.param_groups:
            group["max_lr"] = 0.25
        policy.scheduler.step(increment=1)
        before, after = steps(policy, count=0)
        assert rates == {LR}
        assert {group["lr"] for group in policy.optimizer.param_groups} == {0.25}
        assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch before 2.9 has no Muon")
def test_in_bf16_a_matrix_steps_as_by_the_muon_of_torch():
    """Which rounds to bf16 in other places, and has another floor under the norm."""
    name = "decoder.layers.0.self_attention.linear_proj.weight"
    with build(precision="bf16") as policy:
        before, after = steps(policy)
        weight, index = before[name].clone(), list(before).index(name)
        theirs = torch.optim.Muon(
            [weight], lr=LR, weight_decay=DECAY, momentum=BETA, adjust_lr_fn="match_rms_adamw"
        )
        for number in (0, 1):
            weight.grad = gradient_of(weight, 1000 * number + index)
            theirs.step()
        moved = (weight - before[name]).norm()
        assert (after[name] - weight).norm() / moved < 0.03
