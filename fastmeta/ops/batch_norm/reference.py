"""Batch norm: ``x = (z - mu) r``, ``y = c x + b``, the four maps of docs/maths.md, section 2.

Shapes: ``z``, ``x``, ``y`` and their like are ``[T, M, C]``, M samples and positions of C channels; statistics and
coefficients are ``[T, C]``. Every map is a combination of ``[T, M, C]`` values with one coefficient a channel, so the
means are found first and each map then writes its result once.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Statistics(NamedTuple):
    """Mean, variance (biased) and ``r = 1 / sqrt(var + eps)`` of each channel, ``[T, C]``."""

    mean: Tensor
    variance: Tensor
    r: Tensor


class Tangent(NamedTuple):
    """What the tangent map leaves: ``z_dot`` with its means ``q1 = mean z_dot`` and ``q2 = mean(x z_dot)``."""

    z_dot: Tensor
    q1: Tensor
    q2: Tensor


def combine(terms: list[tuple[Tensor, Tensor]], constant: Tensor) -> Tensor:
    """``sum of coefficient * value + constant``; coefficients and constant are ``[T, C]``."""
    (coefficient, value), *rest = terms
    result = torch.addcmul(constant.unsqueeze(1), value, coefficient.unsqueeze(1))
    for coefficient, value in rest:
        result.addcmul_(value, coefficient.unsqueeze(1))
    return result


def mean(value: Tensor) -> Tensor:
    """Mean over samples and positions, ``[T, C]``."""
    return value.mean(1)


def mean_product(a: Tensor, b: Tensor) -> Tensor:
    """``mean(a b)``, ``[T, C]``."""
    return (a * b).mean(1)


def standardise(z: Tensor, eps: float) -> tuple[Tensor, Statistics]:
    """``x`` by each set's own statistics, and these.

    The variance is the mean square of what the mean leaves: as stable as a running update, and several times faster
    than ``torch.var_mean`` along this axis.
    """
    mu = mean(z)
    x = z - mu.unsqueeze(1)
    variance = mean_product(x, x)
    r = torch.rsqrt(variance + eps)
    return x.mul_(r.unsqueeze(1)), Statistics(mu, variance, r)


def normalise(z: Tensor, mu: Tensor, r: Tensor) -> Tensor:
    """``x = (z - mu) r`` by given statistics; subtracted first, since ``mu`` may be large."""
    return (z - mu.unsqueeze(1)).mul_(r.unsqueeze(1))


def affine(x: Tensor, c: Tensor | None, b: Tensor | None) -> Tensor:
    """``y = c x + b``."""
    if c is None:
        return x if b is None else x + b.unsqueeze(1)
    return x * c.unsqueeze(1) if b is None else torch.addcmul(b.unsqueeze(1), x, c.unsqueeze(1))


def running(old: Tensor, new: Tensor, momentum: float) -> Tensor:
    """Exponential moving average of a statistic."""
    return torch.lerp(old, new, momentum)


def input_cotangent(x: Tensor, r: Tensor, c: Tensor | None, d: Tensor, m1: Tensor, m2: Tensor) -> Tensor:
    """``d_z = c r (d_y - m1 - x m2)`` with ``m1 = mean d_y``, ``m2 = mean(x d_y)``."""
    scale = r if c is None else c * r
    return combine([(scale, d), (-scale * m2, x)], -scale * m1)


def tangent(
    x: Tensor, r: Tensor, c: Tensor | None, move: Tangent | None, c_dot: Tensor | None, b_dot: Tensor | None
) -> Tensor | None:
    """``y_dot = c x_dot + c_dot x + b_dot`` with ``x_dot = r (z_dot - q1 - x q2)``."""
    if move is None:
        if c_dot is None:
            return None if b_dot is None else b_dot.unsqueeze(1).expand(x.shape)
        return affine(x, c_dot, b_dot)
    scale = r if c is None else c * r
    of_x, constant = -scale * move.q2, -scale * move.q1
    if c_dot is not None:
        of_x = of_x + c_dot
    if b_dot is not None:
        constant = constant + b_dot
    return combine([(scale, move.z_dot), (of_x, x)], constant)


def turned_mean(r: Tensor, d: Tensor, move: Tangent, m1: Tensor, m2: Tensor) -> Tensor:
    """``p = mean(d_y x_dot) = r (mean(d_y z_dot) - q1 m1 - q2 m2)``."""
    return r * (mean_product(d, move.z_dot) - move.q1 * m1 - move.q2 * m2)


def input_cotangent_dot(
    x: Tensor,
    r: Tensor,
    c: Tensor | None,
    d: tuple[Tensor, Tensor, Tensor] | None,
    d_dot: tuple[Tensor, Tensor, Tensor] | None,
    move: Tangent | None,
    p: Tensor | None,
    c_dot: Tensor | None,
) -> Tensor | None:
    """Tangent of :func:`input_cotangent`.

    With ``g = c d_y`` and ``g_dot = c_dot d_y + c d_y_dot``::

        d_z_dot = -(q2 r) d_z + r (g_dot - mean g_dot - x_dot mean(g x) - x (mean(g_dot x) + mean(g x_dot)))

    of which each of ``d_y``, ``d_y_dot``, ``x``, ``z_dot`` and 1 has one coefficient a channel.

    Args:
        x, r, c: as saved.
        d: ``d_y`` with ``m1 = mean d_y`` and ``m2 = mean(x d_y)``; ``None`` for zero.
        d_dot: ``d_y_dot`` with the same means of its own.
        move: of the tangent map.
        p: of :func:`turned_mean`, where both ``d`` and ``move`` are there.
        c_dot: tangent of the scale.
    """
    scale = r if c is None else c * r
    terms: list[tuple[Tensor, Tensor]] = []
    of_x = constant = torch.zeros_like(r)
    if d_dot is not None:
        value, n1, n2 = d_dot
        terms.append((scale, value))
        of_x, constant = of_x - scale * n2, constant - scale * n1
    if d is not None:
        value, m1, m2 = d
        of_d = torch.zeros_like(r)
        if c_dot is not None:
            turn = r * c_dot
            of_d, of_x, constant = of_d + turn, of_x - turn * m2, constant - turn * m1
        if move is not None:
            twice = r * scale
            of_d = of_d - twice * move.q2
            of_x = of_x + 2 * twice * move.q2 * m2 - scale * p
            constant = constant + twice * (move.q2 * m1 + move.q1 * m2)
            terms.append((-twice * m2, move.z_dot))
        if c_dot is not None or move is not None:
            terms.append((of_d, value))
    return combine([*terms, (of_x, x)], constant) if terms else None
