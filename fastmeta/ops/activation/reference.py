"""Elementwise functions ``y = f(x)``: value, first and second derivative (docs/maths.md, section 2).

    backward          d_x     = f'(x) d_y
    tangent           y_dot   = f'(x) x_dot
    tangent_backward  d_x_dot = f'(x) d_y_dot + f''(x) x_dot d_y

``f'`` acts the same way on a cotangent and on a tangent, so one ``slope`` serves three maps. A curve is kept as its
input or as its result, whichever the derivatives are cheapest from. Where ``f'`` or ``f''`` jumps, PyTorch's own choice
is taken.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

aten = torch.ops.aten


@dataclass(frozen=True)
class Curve:
    """One function.

    Attributes:
        value: ``x -> f(x)``.
        slope: ``(g, kept) -> f'(x) g``.
        bend: ``kept -> f''(x)``, or ``None`` for piecewise linear curves, where it is zero.
        keeps_result: whether ``kept`` is ``f(x)`` rather than ``x``.
    """

    value: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor, Tensor], Tensor]
    bend: Callable[[Tensor], Tensor] | None = None
    keeps_result: bool = False


def relu() -> Curve:
    """``max(x, 0)``."""
    return Curve(torch.relu, lambda g, y: aten.threshold_backward(g, y, 0), None, keeps_result=True)


def leaky_relu(negative_slope: float) -> Curve:
    """``x`` above zero, ``negative_slope x`` below."""
    return Curve(
        lambda x: aten.leaky_relu(x, negative_slope),
        lambda g, x: aten.leaky_relu_backward(g, x, negative_slope, False),
    )


def hardtanh(low: float, high: float) -> Curve:
    """``min(max(x, low), high)``."""
    return Curve(lambda x: aten.hardtanh(x, low, high), lambda g, x: aten.hardtanh_backward(g, x, low, high))


def tanh() -> Curve:
    """``f' = 1 - y^2``, ``f'' = -2 y (1 - y^2)``."""
    return Curve(torch.tanh, aten.tanh_backward, lambda y: (y * y).sub_(1).mul_(y).mul_(2), keeps_result=True)


def sigmoid() -> Curve:
    """``f' = y (1 - y)``, ``f'' = y (1 - y) (1 - 2 y)``."""
    return Curve(torch.sigmoid, aten.sigmoid_backward, lambda y: (1 - 2 * y).mul_(y).mul_(1 - y), keeps_result=True)


def silu() -> Curve:
    """``y = x s``, ``s = sigmoid(x)``; ``f'' = s (1 - s) (2 + x (1 - 2 s))``."""

    def bend(x: Tensor) -> Tensor:
        s = torch.sigmoid(x)
        return (1 - 2 * s).mul_(x).add_(2).mul_(s).mul_(1 - s)

    return Curve(aten.silu, aten.silu_backward, bend)


def gelu(approximate: str) -> Curve:
    """``x Phi(x)``, ``f'' = phi(x) (2 - x^2)``; or its approximation by ``tanh``."""
    return Curve(
        lambda x: aten.gelu(x, approximate=approximate),
        lambda g, x: aten.gelu_backward(g, x, approximate=approximate),
        _gelu_bend if approximate == "none" else _gelu_tanh_bend,
    )


def _gelu_bend(x: Tensor) -> Tensor:
    square = x * x
    return torch.exp(-0.5 * square).mul_(2 - square).mul_(1 / math.sqrt(2 * math.pi))


def _gelu_tanh_bend(x: Tensor) -> Tensor:
    # y = x (1 + t) / 2 with t = tanh(u), u = a (x + b x^3):
    # f'' = (1 - t^2) (u' + x u'' / 2 - x t u'^2),  u' = a (1 + 3 b x^2),  u'' = 6 a b x
    a, b = math.sqrt(2 / math.pi), 0.044715
    square = x * x
    t = torch.tanh(a * x * (1 + b * square))
    first = a * (1 + 3 * b * square)
    return (1 - t * t).mul_(first + (3 * a * b) * square - x * t * first * first)


def elu(alpha: float, scale: float, input_scale: float) -> Curve:
    """``scale x`` above zero, ``scale alpha (exp(input_scale x) - 1)`` below."""

    def bend(x: Tensor) -> Tensor:
        below = torch.exp(input_scale * x.clamp(max=0)).mul_(scale * alpha * input_scale**2)
        return torch.where(x < 0, below, 0.0)

    return Curve(
        lambda x: aten.elu(x, alpha, scale, input_scale),
        lambda g, x: aten.elu_backward(g, alpha, scale, input_scale, False, x),
        bend,
    )


def softplus(beta: float, threshold: float) -> Curve:
    """``log(1 + exp(beta x)) / beta``, the identity where ``beta x > threshold``."""

    def bend(x: Tensor) -> Tensor:
        s = torch.sigmoid(beta * x)
        return torch.where(beta * x >= threshold, 0.0, beta * s * (1 - s))

    return Curve(
        lambda x: aten.softplus(x, beta, threshold), lambda g, x: aten.softplus_backward(g, x, beta, threshold), bend
    )


def power(exponent: float) -> Curve:
    """``x^p``; ``f' = p x^(p-1)`` and ``f'' = p (p-1) x^(p-2)``, zero where the factor is zero."""

    def bend(x: Tensor) -> Tensor:
        if exponent in (0, 1):
            return torch.zeros_like(x)
        return torch.pow(x, exponent - 2).mul_(exponent * (exponent - 1))

    def slope(g: Tensor, x: Tensor) -> Tensor:
        if exponent == 0:
            return torch.zeros_like(g)
        return g * torch.pow(x, exponent - 1).mul_(exponent)

    return Curve(lambda x: torch.pow(x, exponent), slope, bend)


def absolute() -> Curve:
    """``|x|``."""
    return Curve(torch.abs, lambda g, x: g * torch.sign(x))


def exp() -> Curve:
    """``f' = f'' = y``."""
    return Curve(torch.exp, torch.mul, torch.clone, keeps_result=True)


def log() -> Curve:
    """``f' = 1 / x``, ``f'' = -1 / x^2``."""
    return Curve(torch.log, torch.div, lambda x: (x * x).reciprocal_().neg_())


def sqrt() -> Curve:
    """``f' = 1 / (2 y)``, ``f'' = -1 / (4 y^3)``."""
    return Curve(torch.sqrt, lambda g, y: g / (2 * y), lambda y: torch.pow(y, -3).mul_(-0.25), keeps_result=True)


def rsqrt() -> Curve:
    """``f' = -y^3 / 2``, ``f'' = 3 y^5 / 4``."""
    return Curve(
        torch.rsqrt,
        lambda g, y: g * torch.pow(y, 3).mul_(-0.5),
        lambda y: torch.pow(y, 5).mul_(0.75),
        keeps_result=True,
    )


def reciprocal() -> Curve:
    """``f' = -y^2``, ``f'' = 2 y^3``."""
    return Curve(torch.reciprocal, lambda g, y: -g * (y * y), lambda y: torch.pow(y, 3).mul_(2), keeps_result=True)


def sin() -> Curve:
    """``f' = cos x``, ``f'' = -sin x``."""
    return Curve(torch.sin, lambda g, x: g * torch.cos(x), lambda x: torch.sin(x).neg_())


def cos() -> Curve:
    """``f' = -sin x``, ``f'' = -cos x``."""
    return Curve(torch.cos, lambda g, x: -g * torch.sin(x), lambda x: torch.cos(x).neg_())


def forward(curve: Curve, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``(y, kept)``."""
    y = curve.value(x)
    return y, y if curve.keeps_result else x


def tangent_backward(
    curve: Curve, kept: Tensor, x_dot: Tensor | None, d_y: Tensor | None, d_y_dot: Tensor | None
) -> Tensor | None:
    """``d_x_dot = f' d_y_dot + f'' x_dot d_y``."""
    straight = None if d_y_dot is None else curve.slope(d_y_dot, kept)
    if d_y is None or x_dot is None or curve.bend is None:
        return straight
    bent = curve.bend(kept).mul_(x_dot)
    return bent.mul_(d_y) if straight is None else straight.addcmul_(bent, d_y)
