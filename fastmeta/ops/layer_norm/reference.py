"""Layer norm: ``x = (z - mean z) / s``, ``y = c x + b``, the four maps of docs/maths.md, section 2.

Shapes: ``z``, ``x``, ``y`` are ``[T, R, D]`` (rows of D features), ``r = 1 / s`` is ``[T, R, 1]``, scale ``c`` and
shift ``b`` are ``[T, D]``.
"""

from __future__ import annotations

import torch
from torch import Tensor


def normalise(z: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """``x`` and ``r``."""
    x, _, r = torch.native_layer_norm(z, [z.shape[-1]], None, None, eps)
    return x, r


def affine(x: Tensor, c: Tensor | None, b: Tensor | None) -> Tensor:
    """``y = c x + b``."""
    if c is None:
        return x if b is None else x + b.unsqueeze(1)
    return x * c.unsqueeze(1) if b is None else torch.addcmul(b.unsqueeze(1), x, c.unsqueeze(1))


def mean(value: Tensor) -> Tensor:
    """Mean over features, ``[T, R, 1]``."""
    return value.mean(-1, keepdim=True)


def project(v: Tensor, x: Tensor, r: Tensor) -> Tensor:
    """``(v - mean v - x mean(v x)) r``: the derivative of ``x`` applied to ``v``; it is its own transpose."""
    return torch.addcmul(v - mean(v), x, mean(v * x), value=-1) * r


def input_cotangent_dot(
    x: Tensor, r: Tensor, x_dot: Tensor, turn: Tensor, d_x: Tensor, d_x_dot: Tensor | None
) -> Tensor:
    """Tangent of ``project(d_x)``.

    ``-(mean(x z_dot) r) d_z + r (d_x_dot - mean d_x_dot - x_dot mean(d_x x) - x (mean(d_x_dot x) + mean(d_x x_dot)))``,
    where ``turn = mean(x z_dot) r`` is what the tangent map found.
    """
    twist = torch.addcmul(x_dot * mean(d_x * x), x, mean(d_x * x_dot)) * r
    straight = torch.addcmul(twist, turn, project(d_x, x, r)).neg_()
    return straight if d_x_dot is None else straight.add_(project(d_x_dot, x, r))
