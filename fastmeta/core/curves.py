"""The curves that fused blocks end in: value, first and second derivative, and which activations they are.

Derivatives are functions of ``s``, which is ``y = f(z)`` for the curves that are known from their results and ``z`` for
the others.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fastmeta.core.task_op import Call, Unsupported

KINDS = ("identity", "relu", "leaky_relu", "tanh", "sigmoid", "silu", "gelu")
BY_INPUT = ("silu", "gelu")  # their derivatives are functions of z
BENT = ("tanh", "sigmoid", "silu", "gelu")  # f'' is not zero

ACTIVATIONS = {
    "aten.relu.default": "relu",
    "aten.leaky_relu.default": "leaky_relu",
    "aten.tanh.default": "tanh",
    "aten.sigmoid.default": "sigmoid",
    "aten.silu.default": "silu",
    "aten.gelu.default": "gelu",
}


class Curve(NamedTuple):
    """An activation: its kind, one of ``KINDS``, and a leaky ReLU's slope below zero."""

    kind: str
    below: float = 0.0


def curve_of(activation: Call | None) -> Curve:
    """The curve of an activation's call, the identity without one.

    Raises:
        Unsupported: it is none of :data:`ACTIVATIONS`.
    """
    if activation is None:
        return Curve("identity")
    kind = ACTIVATIONS.get(str(activation.target))
    if kind is None or (kind == "gelu" and activation["approximate"] != "none"):
        raise Unsupported(f"no kernels for {activation.target}")
    return Curve(kind, float(activation["negative_slope"]) if kind == "leaky_relu" else 0.0)


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


def _normal_share(z: Tensor) -> Tensor:
    return 0.5 * (1 + torch.erf(z / math.sqrt(2)))


def _normal_density(z: Tensor) -> Tensor:
    return torch.exp(-0.5 * z * z) / math.sqrt(2 * math.pi)
