"""``y = f(z)``, ``z = a + b``, or ``z = a`` alone: the four maps, of which the kernels are tested to be the same.

    backward          d_z = f'(z) d_y                         d_a = d_b = d_z
    tangent           z_dot = a_dot + b_dot                   y_dot = f'(z) z_dot
    tangent_backward  d_z_dot = f'(z) d_y_dot + f''(z) z_dot d_y

``s`` is what the derivatives of ``f`` are functions of (:mod:`fastmeta.core.curves`). Shapes are all the same.
"""

from __future__ import annotations

from torch import Tensor

from fastmeta.core.curves import BY_INPUT, Curve, bend, slope, value


def forward(curve: Curve, a: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor]:
    """``y`` and ``s``."""
    z = a if b is None else a + b
    y = value(curve, z)
    return y, z if curve.kind in BY_INPUT else y


def backward(curve: Curve, s: Tensor, d_y: Tensor) -> Tensor:
    """``d_z``."""
    return slope(curve, s) * d_y


def tangent(curve: Curve, s: Tensor, z_dot: Tensor) -> Tensor:
    """``y_dot``."""
    return slope(curve, s) * z_dot


def tangent_backward(curve: Curve, s: Tensor, z_dot: Tensor, d_y: Tensor, d_y_dot: Tensor) -> Tensor:
    """``d_z_dot``."""
    return slope(curve, s) * d_y_dot + bend(curve, s) * z_dot * d_y
