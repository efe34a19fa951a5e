"""The iteration against a singular value decomposition."""

import pytest
import torch

from megatron_rl.optimizers import newton_schulz
from megatron_rl.optimizers.newton_schulz import QUINTIC, orthogonalise


def by_svd(matrix, steps):
    """The polynomial on the singular values of the matrix, divided by its Frobenius norm."""
    a, b, c = QUINTIC
    left, values, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    values = values / values.square().sum().sqrt()
    for _ in range(steps):
        values = a * values + b * values**3 + c * values**5
    return left @ torch.diag_embed(values) @ right


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(7, 12), (12, 7), (9, 9), (1, 5), (5, 1)])
@pytest.mark.parametrize("steps", [1, 5])
def test_it_is_the_polynomial_of_the_singular_values(shape, steps):
    matrix = drawn(*shape) * 1e-6  # its size does not matter
    found = orthogonalise(matrix, steps)
    torch.testing.assert_close(found.double(), by_svd(matrix, steps), rtol=0, atol=2e-5)


def test_five_steps_make_singular_values_about_one():
    left, _, right = torch.linalg.svd(drawn(24, 16), full_matrices=False)
    values = torch.logspace(-2, 0, 16)
    values[-1] = 1.0
    found = torch.linalg.svdvals(orthogonalise(left @ torch.diag(values) @ right))
    assert 0.68 < found.min() and found.max() < 1.14


def test_of_a_stack_each_matrix_is_by_itself(monkeypatch):
    stack = drawn(2, 3, 6, 4)
    found = orthogonalise(stack)
    monkeypatch.setattr(newton_schulz, "_AT_A_TIME", 60)  # two matrices at a time
    for each in (found, orthogonalise(stack)):
        for i in range(2):
            for j in range(3):
                torch.testing.assert_close(each[i, j], orthogonalise(stack[i, j]))


def test_zeros_stay_and_small_matrices_are_as_large_ones():
    assert torch.equal(orthogonalise(torch.zeros(3, 4)), torch.zeros(3, 4))
    tiny = orthogonalise(drawn(6, 4) * 1e-30)
    torch.testing.assert_close(tiny, orthogonalise(drawn(6, 4)), rtol=0, atol=1e-5)


def test_in_bf16_it_is_rounded_and_no_more():
    matrix = drawn(32, 48)
    exact, rounded = orthogonalise(matrix), orthogonalise(matrix, dtype=torch.bfloat16)
    assert rounded.dtype == torch.float32
    error = ((rounded - exact).norm() / exact.norm()).item()
    assert 1e-3 < error < 0.05
