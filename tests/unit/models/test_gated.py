"""SwiGLU's product against its equation, in whatever blocks it is made."""

import pytest
import torch

from tests.support.tiny import build_tiny, cpu_device, tiny_config

WIDTH = 6


@pytest.fixture(autouse=True)
def megatron():
    cpu_device()


def written_out(both, weights):
    gate, up = both[..., :WIDTH], both[..., WIDTH:]
    product = gate / (1 + torch.exp(-gate)) * up
    return product if weights is None else product * weights[..., None]


@pytest.fixture(params=[1, 30, 2**17])
def blocks(request, monkeypatch):
    """Blocks of one row, of two or three, and of all."""
    from megatron_rl.models import gated

    monkeypatch.setattr(gated, "BLOCK", request.param)


@pytest.mark.parametrize("shape", [(7,), (7, 1), (0,), (1,)])
@pytest.mark.parametrize("weighted", [True, False])
def test_values_and_gradients_are_those_of_the_equation(shape, weighted, blocks):
    from megatron_rl.models.gated import gated

    generator = torch.Generator().manual_seed(2)
    both = torch.randn(*shape, 2 * WIDTH, generator=generator, dtype=torch.double)
    grad = torch.randn(*shape, WIDTH, generator=generator, dtype=torch.double)
    leaves = [both.requires_grad_()]
    if weighted:
        weights = torch.rand(shape, generator=generator, dtype=torch.double)
        leaves.append(weights.requires_grad_())
    arguments = leaves if weighted else [both, None]
    found, expected = gated(*arguments), written_out(*arguments)
    torch.testing.assert_close(found, expected)
    ours, theirs = (torch.autograd.grad(value, leaves, grad) for value in (found, expected))
    torch.testing.assert_close(ours, theirs)


def test_a_weight_of_nought_still_has_a_gradient():
    from megatron_rl.models.gated import gated

    both = torch.tensor([[0.0, 2.0, 3.0, 5.0]])
    weights = torch.zeros(1).requires_grad_()
    gated(both, weights).sum().backward()
    # silu(0) * 3 + silu(2) * 5
    assert weights.grad.item() == pytest.approx(5 * 2 / (1 + 2.718281828**-2))


def test_bf16_rows_with_fp32_weights():
    from megatron_rl.models.gated import gated

    generator = torch.Generator().manual_seed(3)
    both = torch.randn(5, 2 * WIDTH, generator=generator).bfloat16().requires_grad_()
    weights = torch.rand(5, generator=generator).requires_grad_()
    output = gated(both, weights)
    output.sum().backward()
    wide = [tensor.detach().double().requires_grad_() for tensor in (both, weights)]
    expected = written_out(*wide)
    expected.sum().backward()
    assert (output.dtype, both.grad.dtype, weights.grad.dtype) == (
        torch.bfloat16,
        torch.bfloat16,
        torch.float32,
    )
    torch.testing.assert_close(output.double(), expected, atol=0, rtol=2**-6)
    torch.testing.assert_close(both.grad.double(), wide[0].grad, atol=1e-3, rtol=2**-5)
    torch.testing.assert_close(weights.grad.double(), wide[1].grad, atol=1e-2, rtol=2**-6)


def test_dense_layers_and_shared_experts_are_megatrons():
    """One dense layer, and one with a gated shared expert: values and gradients of the modules."""
    from megatron.core.transformer.mlp import MLP

    from megatron_rl.models.gated import GatedMLP

    model = {
        "moe_layer_freq": [0, 1],
        "shared_expert_ffn_hidden_size": 16,
        "shared_expert_gate": True,
    }
    _, _, (chunk,) = build_tiny(tiny_config(model=model))
    dense, shared = chunk.decoder.layers[0].mlp, chunk.decoder.layers[1].mlp.shared_experts
    assert isinstance(dense, GatedMLP) and isinstance(shared, GatedMLP)
    hidden = torch.randn(9, 1, 32, generator=torch.Generator().manual_seed(4))
    grad = torch.randn(9, 1, 32, generator=torch.Generator().manual_seed(5))
    for module in (dense, shared):
        results = []
        for forward in (GatedMLP.forward, MLP.forward):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(GatedMLP, "forward", forward)
                module.zero_grad(set_to_none=True)
                x = hidden.clone().requires_grad_()
                output = module(x)
                output = output[0] if isinstance(output, tuple) else output
                output.backward(grad)
                results.append([output.detach(), x.grad, *(p.grad for p in module.parameters())])
        for ours, theirs in zip(*results):
            torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)
