"""The rotary turn against complex numbers, and against Megatron's own."""

import cmath

import pytest
import torch

from tests.support.tiny import build_tiny, cpu_device, tiny_config, uneven_norms

POSITIONS = torch.tensor([0, 1, 2, 0, 7])


@pytest.fixture(autouse=True)
def megatron():
    cpu_device()


def turn(width):
    """(angles [T, 1, 1, width], cosines and signed sines as the layers get them)."""
    from megatron_rl.models.attention import PositionalRotaryEmbedding
    from megatron_rl.models.rotary import _turn_of

    embedding = PositionalRotaryEmbedding(width, 1.0, rotary_base=100, use_cpu_initialization=True)
    angles = embedding(POSITIONS).double()
    return angles, *_turn_of(angles, torch.double)


@pytest.mark.parametrize(("rotated", "width"), [(6, 6), (4, 6)])
def test_a_channel_and_its_partner_turn_as_a_complex_number(rotated, width):
    from megatron_rl.models.rotary import rotate

    generator = torch.Generator().manual_seed(width)
    x = torch.randn(len(POSITIONS), 1, 3, width, generator=generator, dtype=torch.double)
    angles, cosines, sines = turn(rotated)
    found = rotate(x, cosines, sines)
    half = rotated // 2
    for t in range(len(POSITIONS)):
        for head in range(3):
            for i in range(half):
                number = complex(x[t, 0, head, i], x[t, 0, head, i + half])
                turned = number * cmath.exp(1j * float(angles[t, 0, 0, i]))
                assert found[t, 0, head, i].item() == pytest.approx(turned.real)
                assert found[t, 0, head, i + half].item() == pytest.approx(turned.imag)
    assert torch.equal(found[..., rotated:], x[..., rotated:])
    assert torch.autograd.gradcheck(lambda y: rotate(y, cosines, sines), x.requires_grad_())


@pytest.mark.parametrize("dtype", [torch.float, torch.bfloat16])
def test_values_are_megatrons(dtype):
    from megatron.core.models.common.embeddings.rope_utils import _apply_rotary_pos_emb_bshd

    from megatron_rl.models.rotary import _turn_of, rotate

    generator = torch.Generator().manual_seed(1)
    x = torch.randn(len(POSITIONS), 1, 2, 8, generator=generator).to(dtype)
    angles = turn(8)[0].float()
    expected = _apply_rotary_pos_emb_bshd(x, angles)
    found = rotate(x, *_turn_of(angles, dtype))
    assert found.dtype == dtype
    rounding = 2e-7 if dtype == torch.float else 2**-7
    torch.testing.assert_close(found, expected, atol=rounding * 2, rtol=rounding)


@pytest.mark.parametrize("rotated", [6, 4])
@pytest.mark.parametrize("normed", [True, False])
def test_heads_are_those_of_norm_and_turn_one_by_one(rotated, normed):
    """2 groups of 3 queries: values and all gradients."""
    from megatron_rl.models.rotary import heads_of, rotate

    generator = torch.Generator().manual_seed(3)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.double)  # noqa: E731
    mixed = draw(len(POSITIONS), 1, 2, 5, 6).requires_grad_()
    weights = [draw(6).requires_grad_() for _ in range(2)] if normed else [None, None]
    _, *turned = turn(rotated)
    grads = [draw(len(POSITIONS), 1, heads, 6) for heads in (6, 2, 2)]

    def norm(x, weight):
        if weight is None:
            return x
        return x / (x.square().mean(-1, keepdim=True) + 1e-3).sqrt() * weight

    def slow():
        query, key, value = mixed[..., :3, :].flatten(2, 3), mixed[..., 3, :], mixed[..., 4, :]
        return *(rotate(norm(x, w), *turned) for x, w in zip((query, key), weights)), value

    found, expected = heads_of(mixed, *turned, *weights, 1e-3), slow()
    leaves = [mixed, *(weight for weight in weights if weight is not None)]
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(
        torch.autograd.grad(found, leaves, grads), torch.autograd.grad(expected, leaves, grads)
    )


def test_sines_are_made_once_for_all_layers_and_once_more_for_another_type():
    from megatron_rl.models.rotary import _turn_of

    angles = turn(8)[0]
    first = _turn_of(angles, torch.float)
    assert _turn_of(angles, torch.float)[0] is first[0]
    assert _turn_of(angles, torch.bfloat16)[0].dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("recompute", "normed"), [("none", True), ("none", False), ("selective", True), ("full", True)]
)
def test_a_model_is_that_with_megatrons_turn(recompute, normed, monkeypatch):
    """Logits, and gradients of all weights."""
    from megatron.core.transformer.attention import SelfAttention

    from megatron_rl.models.attention import packed_placement
    from megatron_rl.models.forward import forward_row
    from megatron_rl.models.rotary import RotarySelfAttention

    def run():
        config = tiny_config(model={"qk_norm": normed}, parallel={"recompute": recompute})
        _, _, (chunk,) = build_tiny(config)
        uneven_norms(chunk)
        tokens = torch.arange(11) * 5 % 64
        placement = packed_placement([4, 7], 11, torch.device("cpu"))
        logits = forward_row(chunk, tokens, placement)
        logits.square().sum().backward()
        return [logits.detach(), *(parameter.grad for parameter in chunk.parameters())]

    ours = run()
    for name in ("forward", "_adjust_key_value_for_inference"):
        monkeypatch.setattr(RotarySelfAttention, name, getattr(SelfAttention, name))
    theirs = run()
    assert any(not torch.equal(a, b) for a, b in zip(ours, theirs))  # not the same code
    for a, b in zip(ours, theirs):
        assert (a - b).norm() <= 2e-6 * b.norm()
