"""``y = f(z)``, ``z = x W^T + b``: the four maps of docs/maths.md, section 2, of an affine map and its activation.

    backward          d_z = f'(z) d_y                            d_x = d_z W        d_W = d_z^T x        d_b = sum d_z
    tangent           z_dot = x_dot W^T + x W_dot^T + b_dot      y_dot = f'(z) z_dot
    tangent_backward  d_z_dot = f'(z) d_y_dot + f''(z) z_dot d_y
                      d_x_dot = d_z_dot W + d_z W_dot   d_W_dot = d_z_dot^T x + d_z^T x_dot   d_b_dot = sum d_z_dot

Shapes: ``x [T, R, I]``, ``y [T, R, O]``; a weight is ``[T, O, I]`` or ``[O, I]`` where tasks share it, a bias
``[T, O]`` or ``[O]``. Derivatives are functions of ``s``, which is ``y`` for the curves that are known from their
results and ``z`` for the others.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

KINDS = ("identity", "relu", "leaky_relu", "tanh", "sigmoid", "silu", "gelu")
BY_INPUT = ("silu", "gelu")  # their derivatives are functions of z
BENT = ("tanh", "sigmoid", "silu", "gelu")  # f'' is not zero


class Curve(NamedTuple):
    """An activation: its kind, one of ``KINDS``, and a leaky ReLU's slope below zero."""

    kind: str
    below: float = 0.0


def value(curve: Curve, z: Tensor) -> Tensor:
    """``f(z)``."""
    if curve.kind == "identity":
        return z
    if curve.kind == "leaky_relu":
        return torch.nn.functional.leaky_relu(z, curve.below)
    if curve.kind in ("silu", "gelu"):
        return getattr(torch.nn.functional, curve.kind)(z)
    return getattr(torch, curve.kind)(z)


def slope(curve: Curve, s: Tensor) -> Tensor:
    """``f'``."""
    if curve.kind == "identity":
        return torch.ones_like(s)
    if curve.kind in ("relu", "leaky_relu"):
        below = curve.below if curve.kind == "leaky_relu" else 0.0
        return torch.where(s > 0, s.new_ones(()), s.new_full((), below))
    if curve.kind == "tanh":
        return 1 - s * s
    if curve.kind == "sigmoid":
        return s * (1 - s)
    if curve.kind == "silu":
        sigmoid = torch.sigmoid(s)
        return sigmoid * (1 + s * (1 - sigmoid))
    return _normal_share(s) + s * _normal_density(s)


def bend(curve: Curve, s: Tensor) -> Tensor:
    """``f''``."""
    if curve.kind == "tanh":
        return -2 * s * (1 - s * s)
    if curve.kind == "sigmoid":
        return s * (1 - s) * (1 - 2 * s)
    if curve.kind == "silu":
        sigmoid = torch.sigmoid(s)
        return sigmoid * (1 - sigmoid) * (2 + s * (1 - 2 * sigmoid))
    if curve.kind == "gelu":
        return _normal_density(s) * (2 - s * s)
    return torch.zeros_like(s)


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


def _normal_share(z: Tensor) -> Tensor:
    return 0.5 * (1 + torch.erf(z / math.sqrt(2)))


def _normal_density(z: Tensor) -> Tensor:
    return torch.exp(-0.5 * z * z) / math.sqrt(2 * math.pi)
