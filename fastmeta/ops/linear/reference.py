"""Affine map of every task, ``y = x W^T + b``: the four maps of docs/maths.md, section 2.

Shapes: ``x [T, R, in]`` (``R`` rows: samples times tokens), ``y [T, R, out]``. A weight is ``[out, in]`` where all
tasks share it, which makes each product with it one product over all tasks, or ``[T, out, in]``, or a
:class:`LowRank` that is never formed; a bias is ``[out]`` or ``[T, out]``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastmeta.core.low_rank import Factor, LowRank
from fastmeta.core.product import linear, product

Weight = Tensor | LowRank


def forward(x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
    """``y = x W^T + b``."""
    if isinstance(weight, LowRank):
        y = weight.of_rows(x)
        return y if bias is None else y.add_(bias.unsqueeze(1) if bias.dim() == 2 else bias)
    if weight.dim() == 2:
        if bias is None or bias.dim() == 1:
            return linear(x.flatten(0, 1), weight, bias).unflatten(0, x.shape[:2])
        return linear(x.flatten(0, 1), weight).unflatten(0, x.shape[:2]).add_(bias.unsqueeze(1))
    if weight.shape[0] == 1:
        return linear(x[0], weight[0], bias[0] if bias is not None and bias.dim() == 2 else bias).unsqueeze(0)
    if bias is None:
        return torch.bmm(x, weight.mT)
    return torch.baddbmm(bias.unsqueeze(1) if bias.dim() == 2 else bias, x, weight.mT)


def input_cotangent(d_y: Tensor, weight: Weight) -> Tensor:
    """``d_x = d_y W``."""
    if isinstance(weight, LowRank):
        return weight.of_cotangents(d_y)
    if weight.dim() == 2:
        return product(d_y.flatten(0, 1), weight).unflatten(0, d_y.shape[:2])
    return product(d_y[0], weight[0]).unsqueeze(0) if weight.shape[0] == 1 else torch.bmm(d_y, weight)


def weight_cotangent(d_y: Tensor, x: Tensor, shared: bool) -> Tensor:
    """``d_W = d_y^T x``, ``[T, out, in]``; summed over tasks, ``[out, in]``, as one product over stacked rows."""
    if shared:
        return product(d_y.flatten(0, 1).t(), x.flatten(0, 1))
    return product(d_y[0].t(), x[0]).unsqueeze(0) if x.shape[0] == 1 else torch.bmm(d_y.mT, x)


def bias_cotangent(d_y: Tensor, shared: bool) -> Tensor:
    """``d_b = sum of d_y over rows``, ``[T, out]``, or over tasks too, ``[out]``."""
    return d_y.sum((0, 1)) if shared else d_y.sum(1)


def tangent(
    x: Tensor, weight: Weight, x_dot: Tensor | None, weight_dot: Weight | None, bias_dot: Tensor | None
) -> Tensor | None:
    """``y_dot = x_dot W^T + x W_dot^T + b_dot``."""
    if weight_dot is None:
        if x_dot is not None:
            return forward(x_dot, weight, bias_dot)
        return None if bias_dot is None else bias_dot.unsqueeze(1).expand(-1, x.shape[1], -1)
    if x_dot is None:
        return forward(x, weight_dot, bias_dot)
    if not isinstance(weight, LowRank) and not isinstance(weight_dot, LowRank) and x.shape[0] > 1:
        if weight.dim() == 3:
            return forward(x, weight_dot, bias_dot).baddbmm_(x_dot, weight.mT)
        y_dot = forward(x_dot, weight, None).baddbmm_(x, weight_dot.mT)
        return y_dot if bias_dot is None else y_dot.add_(bias_dot.unsqueeze(1))
    return forward(x, weight_dot, bias_dot).add_(forward(x_dot, weight, None))


def input_cotangent_dot(
    d_y: Tensor | None, d_y_dot: Tensor | None, weight: Weight, weight_dot: Weight | None
) -> Tensor | None:
    """``d_x_dot = d_y_dot W + d_y W_dot``."""
    straight = None if d_y_dot is None else input_cotangent(d_y_dot, weight)
    if d_y is None or weight_dot is None:
        return straight
    if straight is not None and not isinstance(weight_dot, LowRank) and weight_dot.shape[0] > 1:
        return straight.baddbmm_(d_y, weight_dot)
    bent = input_cotangent(d_y, weight_dot)
    return bent if straight is None else straight.add_(bent)


def weight_cotangent_dot(
    d_y: Tensor | None, d_y_dot: Tensor | None, x: Tensor, x_dot: Tensor | None, shared: bool
) -> Tensor | None:
    """``d_W_dot = d_y_dot^T x + d_y^T x_dot``."""
    straight = None if d_y_dot is None else weight_cotangent(d_y_dot, x, shared)
    if d_y is None or x_dot is None:
        return straight
    if straight is None:
        return weight_cotangent(d_y, x_dot, shared)
    if shared or x.shape[0] == 1:
        return straight.add_(weight_cotangent(d_y, x_dot, shared))
    return straight.baddbmm_(d_y.mT, x_dot)


def weight_factors(d_y: Tensor | None, x: Tensor | None) -> tuple[Factor, ...]:
    """``d_y^T x`` of every task, not formed; nothing where one of them is zero."""
    return () if d_y is None or x is None else (Factor(d_y, x),)
