"""Approximates the nearest semi-orthogonal matrix; Muon applies it to a direction."""

from __future__ import annotations

import torch

#: a, b, c of x -> a x + b x^3 + c x^5 on singular values (Keller Jordan, "Muon: An optimizer for
#: hidden layers in neural networks", 2024). Five steps bring values from 0.004 of the Frobenius
#: norm upward into [0.68, 1.14]; smaller ones grow 485 times.
QUINTIC = (3.4445, -4.7750, 2.0315)

#: Elements in work at a time, so that a stack of experts takes no more memory than a few of its
#: matrices.
_AT_A_TIME = 1 << 26


def orthogonalise(
    matrices: torch.Tensor, steps: int = 5, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """U S' V^T for matrices U S V^T, by Newton-Schulz iteration: S' are about 1.

    Args:
        matrices: [..., m, n], each treated separately. A matrix of zeros stays zero.
        steps: of the iteration.
        dtype: of the products; bf16 is faster on a GPU and rounds its results.

    Returns:
        [..., m, n] in the dtype of ``matrices``.
    """
    stack = matrices.reshape(-1, *matrices.shape[-2:])
    size = max(1, _AT_A_TIME // max(1, stack[0].numel()))
    parts = [_iterate(part, steps, dtype) for part in stack.split(size)]
    return torch.cat(parts).view_as(matrices)


def _iterate(matrices: torch.Tensor, steps: int, dtype: torch.dtype) -> torch.Tensor:
    """The iteration on matrices [k, m, n]."""
    a, b, c = QUINTIC
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.float()
    # Divide by the largest element first, since squares of small ones underflow; zeros stay zeros.
    x = x / x.abs().amax((-2, -1), keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    x = (x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=1.0)).to(dtype)
    x = x.mT if tall else x  # the smaller square products
    for _ in range(steps):
        square = x @ x.mT
        # One call for product and sum rounds once.
        factor = torch.baddbmm(square, square, square, beta=b, alpha=c)
        x = torch.baddbmm(x, factor, x, beta=a)
    return (x.mT if tall else x).to(matrices.dtype)
