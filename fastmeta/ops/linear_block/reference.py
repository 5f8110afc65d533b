"""``y = f(z)``, ``z = x W^T + b``: the four maps of docs/maths.md, section 2, of an affine map and its activation.

    backward          d_z = f'(z) d_y                            d_x = d_z W        d_W = d_z^T x        d_b = sum d_z
    tangent           z_dot = x_dot W^T + x W_dot^T + b_dot      y_dot = f'(z) z_dot
    tangent_backward  d_z_dot = f'(z) d_y_dot + f''(z) z_dot d_y
                      d_x_dot = d_z_dot W + d_z W_dot   d_W_dot = d_z_dot^T x + d_z^T x_dot   d_b_dot = sum d_z_dot

Shapes: ``x [T, R, I]``, ``y [T, R, O]``; a weight is ``[T, O, I]`` or ``[O, I]`` where tasks share it, a bias
``[T, O]`` or ``[O]``. ``s`` is what the derivatives of ``f`` are functions of (:mod:`fastmeta.core.curves`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastmeta.core.curves import BY_INPUT, Curve, bend, slope, value


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, curve: Curve) -> tuple[Tensor, Tensor]:
    """``y`` and ``s``."""
    z = rows(x, weight, bias)
    y = value(curve, z)
    return y, z if curve.kind in BY_INPUT else y


def backward(x: Tensor, weight: Tensor, s: Tensor, d_y: Tensor, curve: Curve) -> tuple[Tensor, Tensor, Tensor]:
    """``d_x``, and ``d_W`` and ``d_b`` of every task."""
    d_z = slope(curve, s) * d_y
    return torch.matmul(d_z, weight), torch.matmul(d_z.mT, x), d_z.sum(1)


def tangent(
    x: Tensor, weight: Tensor, s: Tensor, x_dot: Tensor, weight_dot: Tensor, bias_dot: Tensor | None, curve: Curve
) -> tuple[Tensor, Tensor]:
    """``y_dot`` and ``z_dot``."""
    z_dot = rows(x_dot, weight, None) + rows(x, weight_dot, bias_dot)
    return slope(curve, s) * z_dot, z_dot


def tangent_backward(
    x: Tensor,
    weight: Tensor,
    s: Tensor,
    x_dot: Tensor,
    weight_dot: Tensor,
    z_dot: Tensor,
    d_y: Tensor,
    d_y_dot: Tensor,
    curve: Curve,
) -> tuple[Tensor, Tensor, Tensor]:
    """``d_x_dot``, and ``d_W_dot`` and ``d_b_dot`` of every task."""
    d_z = slope(curve, s) * d_y
    d_z_dot = slope(curve, s) * d_y_dot + bend(curve, s) * z_dot * d_y
    d_x_dot = torch.matmul(d_z_dot, weight) + torch.matmul(d_z, weight_dot)
    return d_x_dot, torch.matmul(d_z_dot.mT, x) + torch.matmul(d_z.mT, x_dot), d_z_dot.sum(1)


def rows(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``x W^T + b``."""
    z = torch.matmul(x, weight.mT)
    return z if bias is None else z + (bias.unsqueeze(1) if bias.dim() == 2 else bias)
