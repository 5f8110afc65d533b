"""Batch norm: ``x = (z - mu) r``, ``y = c x + b``, the four maps of docs/maths.md, section 2.

Shapes: ``z``, ``x``, ``y`` and their like are ``[T, M, C]``, M samples and positions of C channels; statistics and
coefficients are ``[T, C]``. Every map is a combination of ``[T, M, C]`` values with one coefficient a channel, so the
means are found first and each map then writes its result once.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

aten = torch.ops.aten

# Above so many elements of a task's set, PyTorch's backward kernel, task by task, finds both means in one pass, where
# separate calls over all tasks pass over memory three times. The set is then kept as it came, and not normalised.
FUSED_ELEMENTS = 1 << 17


class Normalised(NamedTuple):
    """``x``, ``[T, M, C]``: ``v`` itself, or ``(v - mu) r`` where ``mu`` is given and ``x`` was never written."""

    v: Tensor
    mu: Tensor | None
    r: Tensor


class Tangent(NamedTuple):
    """What the tangent map leaves: ``z_dot`` with its means ``q1 = mean z_dot`` and ``q2 = mean(x z_dot)``."""

    z_dot: Tensor
    q1: Tensor
    q2: Tensor


def fused(z: Tensor) -> bool:
    """Whether PyTorch's backward kernel, task by task, beats calls over all tasks."""
    return z.device.type == "cpu" and z.shape[1] * z.shape[2] > FUSED_ELEMENTS


def combine(terms: list[tuple[Tensor, Tensor]], of_x: Tensor, x: Normalised, constant: Tensor) -> Tensor:
    """``sum of coefficient * value + of_x * x + constant``; coefficients and constant are ``[T, C]``."""
    if x.mu is not None:
        of_x = of_x * x.r
        constant = constant - of_x * x.mu
    (coefficient, value), *rest = [*terms, (of_x, x.v)]
    result = torch.addcmul(constant.unsqueeze(1), value, coefficient.unsqueeze(1))
    for coefficient, value in rest:
        result.addcmul_(value, coefficient.unsqueeze(1))
    return result


def means(d: Tensor, x: Normalised) -> tuple[Tensor, Tensor]:
    """``mean d`` and ``mean(x d)`` over samples and positions, ``[T, C]``."""
    if x.mu is None:
        return d.mean(1), (x.v * d).mean(1)
    return centred_means(d, x.v, x.mu, x.r)


def centred_means(d: Tensor, v: Tensor, mu: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    """``mean d`` and ``mean((v - mu) r d)`` from one pass over ``d`` and ``v``, by the sums of PyTorch's backward."""
    rows = [
        aten.native_batch_norm_backward(d_t, v_t, None, None, None, mu_t, r_t, True, 0.0, [False, True, True])[1:]
        for d_t, v_t, mu_t, r_t in zip(planes(d), planes(v), channels(mu), channels(r), strict=True)
    ]
    product, plain = (torch.stack(sums).mul_(1 / d.shape[1]) for sums in zip(*rows, strict=True))
    return plain, product


def planes(value: Tensor) -> tuple[Tensor, ...]:
    """Each task's ``[M, C]`` as one image ``[1, C, M, 1]`` with channels last, the layout those kernels are fast in."""
    tasks, rows, width = value.shape
    return value.contiguous().view(tasks, 1, rows, 1, width).permute(0, 1, 4, 2, 3).unbind(0)


def channels(value: Tensor) -> tuple[Tensor, ...]:
    """Each task's ``[C]``, dense: the kernels read parameters and statistics without looking at strides."""
    return value.contiguous().unbind(0)


def batch_forward(
    z: Tensor, c: Tensor | None, b: Tensor | None, running: tuple[Tensor, Tensor] | None, momentum: float, eps: float
) -> tuple[Tensor, Normalised, Tensor, tuple[Tensor, Tensor] | None]:
    """Normalise by each task's own statistics.

    Returns:
        ``y``, ``x``, the mean, and the new running mean and variance (of which the variance is unbiased, as PyTorch's).
    """
    mu = z.mean(1)
    x = z - mu.unsqueeze(1)
    # In two passes, and not by PyTorch's kernel for channels last: that one sums a set in float32, which costs a digit
    # of the meta-gradient (Omniglot, 5 images of 28x28: 2e-5 from float64 instead of 2e-6).
    variance = (x * x).mean(1)
    r = torch.rsqrt(variance + eps)
    if running is not None:
        unbiased = variance * (z.shape[1] / max(z.shape[1] - 1, 1))
        running = torch.lerp(running[0], mu, momentum), torch.lerp(running[1], unbiased, momentum)
    if fused(z):
        return affine(x, r if c is None else c * r, b), Normalised(z, mu, r), mu, running
    x.mul_(r.unsqueeze(1))
    return affine(x, c, b), Normalised(x, None, r), mu, running


def fixed_forward(
    z: Tensor, c: Tensor | None, b: Tensor | None, mu: Tensor, variance: Tensor, eps: float
) -> tuple[Tensor, Normalised]:
    """Normalise by given statistics; return ``y`` and ``x``."""
    r = torch.rsqrt(variance + eps)
    if not fused(z):
        x = (z - mu.unsqueeze(1)).mul_(r.unsqueeze(1))
        return affine(x, c, b), Normalised(x, None, r)
    scale = r if c is None else c * r
    shift = -scale * mu if b is None else b - scale * mu
    return affine(z, scale, shift), Normalised(z, mu, r)


def affine(x: Tensor, c: Tensor | None, b: Tensor | None) -> Tensor:
    """``y = c x + b``."""
    if c is None:
        return x if b is None else x + b.unsqueeze(1)
    return x * c.unsqueeze(1) if b is None else torch.addcmul(b.unsqueeze(1), x, c.unsqueeze(1))


def input_cotangent(x: Normalised, c: Tensor | None, d: Tensor, m1: Tensor, m2: Tensor) -> Tensor:
    """``d_z = c r (d_y - m1 - x m2)`` with ``m1 = mean d_y``, ``m2 = mean(x d_y)``."""
    scale = x.r if c is None else c * x.r
    return combine([(scale, d)], -scale * m2, x, -scale * m1)


def tangent(
    x: Normalised, c: Tensor | None, move: Tangent | None, c_dot: Tensor | None, b_dot: Tensor | None
) -> Tensor | None:
    """``y_dot = c x_dot + c_dot x + b_dot`` with ``x_dot = r (z_dot - q1 - x q2)``."""
    constant = torch.zeros_like(x.r) if b_dot is None else b_dot
    if move is None:
        if c_dot is not None:
            return combine([], c_dot, x, constant)
        return None if b_dot is None else b_dot.unsqueeze(1).expand(x.v.shape)
    scale = x.r if c is None else c * x.r
    of_x = -scale * move.q2
    return combine([(scale, move.z_dot)], of_x if c_dot is None else of_x + c_dot, x, constant - scale * move.q1)


def turned_mean(x: Normalised, d: Tensor, move: Tangent, m1: Tensor, m2: Tensor) -> Tensor:
    """``p = mean(d_y x_dot) = r (mean(d_y (z_dot - q1)) - q2 m2)``."""
    if x.mu is None:
        product = (d * move.z_dot).mean(1) - move.q1 * m1
    else:
        product = centred_means(d, move.z_dot, move.q1, torch.ones_like(x.r))[1]
    return x.r * (product - move.q2 * m2)


def input_cotangent_dot(
    x: Normalised,
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
        x: as saved.
        c: the scale.
        d: ``d_y`` with ``m1 = mean d_y`` and ``m2 = mean(x d_y)``; ``None`` for zero.
        d_dot: ``d_y_dot`` with the same means of its own.
        move: of the tangent map.
        p: of :func:`turned_mean`; given where ``d`` and ``move`` are.
        c_dot: tangent of the scale.
    """
    r = x.r
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
        if move is not None and p is not None:
            twice = r * scale
            of_d = of_d - twice * move.q2
            of_x = of_x + 2 * twice * move.q2 * m2 - scale * p
            constant = constant + twice * (move.q2 * m1 + move.q1 * m2)
            terms.append((-twice * m2, move.z_dot))
        if c_dot is not None or move is not None:
            terms.append((of_d, value))
    return combine(terms, of_x, x, constant) if terms else None
