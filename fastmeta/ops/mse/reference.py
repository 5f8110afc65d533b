"""Squared error of every task, ``e = x - y``: the four maps. Losses reduce over all axes but the task axis.

forward           l       = s sum e^2           s = 1/n for the mean, 1 for the sum; without the sum if unreduced
backward          d_x     = 2 s d_l e           d_y = -d_x
tangent           l_dot   = 2 s sum e e_dot     e_dot = x_dot - y_dot
tangent_backward  d_x_dot = 2 s (d_l_dot e + d_l e_dot)
"""

from __future__ import annotations

from torch import Tensor

NONE, MEAN, SUM = 0, 1, 2  # ATen's reductions


def forward(x: Tensor, y: Tensor, reduction: int) -> tuple[Tensor, Tensor]:
    """Return the loss, ``[T]`` or ``[T, ...]``, and ``e``. ``reduction`` is ``NONE``, ``MEAN`` or ``SUM``."""
    e = x - y
    square = e * e
    if reduction == NONE:
        return square, e
    rows = square.flatten(1) if square.dim() > 1 else square.unsqueeze(1)
    return rows.mean(1) if reduction == MEAN else rows.sum(1), e


def backward(e: Tensor, d_l: Tensor, scale: float) -> Tensor:
    """``d_x = 2 s d_l e``."""
    return aligned(d_l * (2 * scale), e) * e


def tangent(e: Tensor, e_dot: Tensor, scale: float, reduced: bool) -> Tensor:
    """``l_dot = 2 s sum e e_dot``."""
    product = e * e_dot
    if reduced:
        product = product.flatten(1).sum(1) if product.dim() > 1 else product
    return product.mul_(2 * scale)


def tangent_backward(
    e: Tensor, e_dot: Tensor | None, d_l: Tensor | None, d_l_dot: Tensor | None, scale: float
) -> Tensor | None:
    """``d_x_dot = 2 s (d_l_dot e + d_l e_dot)``."""
    straight = None if d_l_dot is None else backward(e, d_l_dot, scale)
    if d_l is None or e_dot is None:
        return straight
    bent = backward(e_dot, d_l, scale)
    return bent if straight is None else bent.add_(straight)


def aligned(d_l: Tensor, e: Tensor) -> Tensor:
    """``d_l`` with axes of size one where the loss was reduced."""
    return d_l.reshape(d_l.shape[0], *(1,) * (e.dim() - 1)) if d_l.dim() < e.dim() else d_l
